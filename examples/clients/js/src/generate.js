// Generates text with a decoder: in batches, with a KV cache, each row with its own adapter.
import { int64, padded, positionsOf, together } from "./batch.js";
import { BundleError, UsageError } from "./errors.js";
import { floats, zeros } from "./floats.js";
import { adjust, choose, randomOf } from "./logits.js";
import { presentOf } from "./manifest.js";
import { pieces } from "./pieces.js";

const FED = ["input_ids", "attention_mask", "position_ids", "token_type_ids"];

/** Throw an error if the graph of `manifest` cannot generate text. */
export function checkDecoder(manifest) {
  if (manifest.task !== "causal-lm") throw new UsageError(`this bundle is for ${manifest.task}: it generates no text`);
  if (!manifest.past.length) throw new BundleError("the graph has no KV cache, which this client needs: use Python");
  const other = manifest.inputs.find((input) => !FED.includes(input.name) && !manifest.past.includes(input));
  if (other) throw new BundleError(`the graph takes ${other.name}, which this client does not make: use Python`);
  if (manifest.inputs.some(({ name, shape }) => name === "input_ids" && shape.some(Number.isInteger))) {
    throw new BundleError("the graph has fixed sizes: export the bundle without --fixed");
  }
  if (!manifest.outputs.some(({ name }) => name === "logits")) throw new BundleError("the graph gives no logits");
}

/**
 * Continue `rows`, each { prompt, texts, adapter }: token ids, a `Texts`, and side inputs or null.
 * `stackOf(rows)` returns the side inputs of rows that share a batch. Sets { ids, stopped } of each row.
 */
export async function generate(graph, manifest, rows, stackOf, { maxNewTokens, sampling, onToken, signal }) {
  for (const row of rows) {
    row.ids = [];
    row.stopped = false;
    row.limit = Math.min(maxNewTokens, row.texts.maxLength - row.prompt.length);
    row.random = randomOf(sampling.seed);
    row.piece = pieces(row.texts);
  }
  for (const numbers of together(rows.map(({ prompt }) => prompt), manifest.padding)) {
    const batch = numbers.map((number) => ({ row: rows[number], number }));
    const stacked = graph.tensors(stackOf(batch.map(({ row }) => row)));
    await decode(graph, manifest, batch, stacked, { sampling, onToken, signal });
  }
  return rows;
}

async function decode(graph, manifest, batch, stacked, { sampling, onToken, signal }) {
  const padId = batch[0].row.texts.padId;
  let { ids, mask } = padded(batch.map(({ row }) => row.prompt), padId, manifest.padding);
  const length = ids[0].length;
  let ends = batch.map(({ row }) => (manifest.padding === "right" ? row.prompt.length : length) - 1);
  let cache = emptyCache(manifest, batch.length);
  const outputs = ["logits", ...manifest.past.map(({ name }) => presentOf(name))];
  try {
    for (;;) {
      signal?.throwIfAborted();
      const made = {
        input_ids: () => int64(ids),
        attention_mask: () => int64(mask),
        position_ids: () => int64(positionsOf(mask, ids[0].length)),
        token_type_ids: () => int64(ids.map((row) => row.map(() => 0))),
      };
      const feeds = { ...stacked, ...cache };
      for (const { name } of manifest.inputs) if (name in made) feeds[name] = made[name]();
      const results = await graph.run(feeds, outputs);
      dispose(cache);
      cache = Object.fromEntries(manifest.past.map(({ name }) => [name, results[presentOf(name)]]));
      const { data, dims } = results.logits; // [rows, sequence, vocabulary]
      const [, sequence, vocabulary] = dims;
      batch.forEach(({ row, number }, index) => {
        if (ended(row)) return;
        const end = index * sequence + (sequence === 1 ? 0 : ends[index]); // some graphs return the last position only
        const scores = floats(data.slice(end * vocabulary, (end + 1) * vocabulary));
        const text = advance(row, scores, sampling);
        if (text) onToken?.(text, number);
      });
      if (batch.every(({ row }) => ended(row))) return;
      // A row that has ended continues with padding, which is masked out.
      ids = batch.map(({ row }) => [ended(row) ? padId : row.ids.at(-1)]);
      mask = mask.map((row, index) => [...row, ended(batch[index].row) ? 0 : 1]);
      ends = batch.map(() => 0);
      if (onToken) await painted();
    }
  } finally {
    dispose(cache);
  }
}

function ended({ stopped, ids, limit }) {
  return stopped || ids.length >= limit;
}

/** Choose the next token of `row`, and return the text that it completes. */
function advance(row, scores, sampling) {
  const { settings, ends } = row.texts;
  adjust(scores, settings, row.prompt, row.ids, ends);
  const token = choose(scores, sampling, settings, row.random);
  if (ends.has(token)) {
    row.stopped = true;
    return row.piece();
  }
  row.ids.push(token);
  const text = row.piece(token);
  return ended(row) ? text + row.piece() : text;
}

function emptyCache(manifest, rows) {
  const empty = ({ name, dtype, shape }) => [name, { type: dtype, data: zeros(dtype, 0), dims: [rows, shape[1], 0, shape[3]] }];
  return Object.fromEntries(manifest.past.map(empty));
}

/** Free the tensors that are on a device. */
function dispose(cache) {
  for (const value of Object.values(cache)) if (value.location === "gpu-buffer") value.dispose();
}

/** Let a browser paint; awaiting a resolved promise is not enough. */
function painted() {
  return new Promise((resume) => setTimeout(resume));
}
