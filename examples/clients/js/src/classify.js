// Logits of a sequence classifier, each text with its own adapter.
import { int64, padded, together } from "./batch.js";
import { BundleError, UsageError } from "./errors.js";
import { floats } from "./floats.js";

const FED = ["input_ids", "attention_mask", "token_type_ids"];

/** Throw where the graph of `manifest` is no classifier of texts. */
export function checkClassifier(manifest) {
  if (manifest.task !== "sequence-classification") throw new UsageError(`this bundle is for ${manifest.task}: it is no classifier of texts`);
  const other = manifest.inputs.find(({ name }) => !FED.includes(name));
  if (other) throw new BundleError(`the graph takes ${other.name}, which this client does not make: use Python`);
}

/** The logits, a Float32Array for each of `rows`, which are as `generate` takes them. */
export async function classify(graph, manifest, rows, stackOf) {
  const found = Array(rows.length);
  for (const numbers of together(rows.map(({ prompt }) => prompt), manifest.padding)) {
    const batch = numbers.map((number) => rows[number]);
    const { ids, mask } = padded(batch.map(({ prompt }) => prompt), batch[0].texts.padId, manifest.padding);
    const made = {
      input_ids: () => int64(ids),
      attention_mask: () => int64(mask),
      token_type_ids: () => int64(ids.map((row) => row.map(() => 0))),
    };
    const feeds = { ...stackOf(batch) };
    for (const { name } of manifest.inputs) feeds[name] = made[name]();
    const { logits } = await graph.run(feeds, ["logits"]);
    const labels = logits.dims[1];
    numbers.forEach((number, index) => {
      found[number] = floats(logits.data.slice(index * labels, (index + 1) * labels));
    });
  }
  return found;
}
