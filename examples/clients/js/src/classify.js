// Classifies texts and tokens, each text with its own adapter.
import { encodeRows } from "./encode.js";
import { UsageError } from "./errors.js";

/** Throw UsageError unless the bundle is a sequence classifier. */
export function checkClassifier({ task }) {
  if (task !== "sequence-classification") throw new UsageError(`this bundle is for ${task}: it does not classify texts`);
}

/** Throw UsageError unless the bundle is a token classifier. */
export function checkTokenClassifier({ task }) {
  if (task !== "token-classification") throw new UsageError(`this bundle is for ${task}: it does not classify tokens`);
}

/** The logits, a Float32Array for each of `rows`; rows are the same as for `generate`. */
export async function classify(graph, manifest, rows, stackOf) {
  return (await encodeRows(graph, manifest, rows, stackOf, "logits")).map(({ data }) => data);
}

/**
 * For each of `rows`, its tokens without special tokens: { id, token, logits, label, score }.
 *
 * A row has `parts`, the result of `wordsOf`, and `labels`, the label names, or null if they are unknown.
 */
export async function classifyTokens(graph, manifest, rows, stackOf) {
  const found = await encodeRows(graph, manifest, rows, stackOf, "logits");
  return rows.map(({ parts, labels }, number) => {
    const { data, width } = found[number];
    return parts.own.map((id, index) => {
      const place = (parts.before.length + index) * width;
      // An adapter may have fewer labels than the graph has outputs.
      const logits = data.slice(place, place + Math.min(width, labels?.length ?? width));
      const { best, score } = likeliest(logits);
      return { id, token: parts.words[index], logits, label: labels?.[best] ?? null, score };
    });
  });
}

/** The index of the largest of `logits`, and its probability. */
function likeliest(logits) {
  const best = logits.indexOf(Math.max(...logits));
  const sum = logits.reduce((total, logit) => total + Math.exp(logit - logits[best]), 0);
  return { best, score: 1 / sum };
}
