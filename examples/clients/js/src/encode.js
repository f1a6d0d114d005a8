// Runs encoders on batches of rows, and returns each row's part of the output.
import { int64, padded, together } from "./batch.js";
import { BundleError } from "./errors.js";
import { floats } from "./floats.js";

const FED = ["input_ids", "attention_mask", "token_type_ids"];

/** Throw BundleError if the graph of `manifest` has inputs that a text encoder does not have. */
export function checkEncoder(manifest) {
  const other = manifest.inputs.find(({ name }) => !FED.includes(name));
  if (other) throw new BundleError(`the graph takes ${other.name}, which this client does not make: use Python`);
}

/**
 * The graph's output `output` for each of `rows`, { prompt, texts, adapter }: { data, width, whole } with a
 * Float32Array of the row's tokens without padding; `whole`: there is one vector for the whole row instead.
 */
export async function encodeRows(graph, manifest, rows, stackOf, output) {
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
    const values = (await graph.run(feeds, [output]))[output];
    const width = values.dims.at(-1);
    const row = values.data.length / batch.length;
    numbers.forEach((number, index) => {
      const length = rows[number].prompt.length;
      const begin = index * row + (values.dims.length === 3 && manifest.padding === "left" ? row - length * width : 0);
      const count = values.dims.length === 3 ? length * width : width;
      found[number] = { data: floats(values.data.slice(begin, begin + count)), width, whole: values.dims.length === 2 };
    });
  }
  return found;
}
