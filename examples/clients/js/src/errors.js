// The errors of this package. A message is one line: what, where, what to do.

export class LoraDeployError extends Error {
  constructor(message) {
    super(String(message).replace(/\s*\n\s*/g, " "));
    this.name = new.target.name;
  }
}

/** Options that cannot be combined, or a value out of range. */
export class UsageError extends LoraDeployError {}

/** A bundle that is invalid, or that this backend cannot run. */
export class BundleError extends LoraDeployError {}

/** An adapter that cannot be read, or does not fit the bundle. */
export class AdapterError extends LoraDeployError {}

/** The first `most` of `problems`, and the number of others. */
export function listed(problems, most = 6) {
  const rest = problems.length - most;
  return problems.slice(0, most).join("; ") + (rest > 0 ? `; and ${rest} more` : "");
}

/** Throw UsageError unless `given` is an object of options in `known`: a key may be misspelled. */
export function checkOptions(where, given, known) {
  if (Object(given) !== given) throw new UsageError(`${where} takes an object of: ${known.join(", ")}`);
  for (const name of Object.keys(given)) {
    if (!known.includes(name)) {
      throw new UsageError(`${where} has no option ${name}; there are: ${known.join(", ")}`);
    }
  }
}
