// Every error that this package throws on purpose. A message is one line: what, where, what to do.

export class LoraDeployError extends Error {
  constructor(message) {
    super(String(message).replace(/\s*\n\s*/g, " "));
    this.name = new.target.name;
  }
}

/** Options that do not go together, or a value out of its range. */
export class UsageError extends LoraDeployError {}

/** A bundle that is broken, or that this backend cannot run. */
export class BundleError extends LoraDeployError {}

/** An adapter that cannot be read, or does not fit the bundle. */
export class AdapterError extends LoraDeployError {}

/** The first of `problems`, with the count of the others. */
export function listed(problems, most = 6) {
  const rest = problems.length - most;
  return problems.slice(0, most).join("; ") + (rest > 0 ? `; and ${rest} more` : "");
}

/** Throw UsageError where `given` has a key that is not one of `known`: a typing mistake would go unseen. */
export function checkOptions(where, given, known) {
  for (const name of Object.keys(given)) {
    if (!known.includes(name)) {
      throw new UsageError(`${where} has no option ${name}; there are: ${known.join(", ")}`);
    }
  }
}
