// Classifiers of texts and of their tokens, each text with its own adapter.
import { encodeRows } from "./encode.js";
import { UsageError } from "./errors.js";

/** Throw where the graph of `manifest` is no classifier of texts. */
export function checkClassifier({ task }) {
  if (task !== "sequence-classification") throw new UsageError(`this bundle is for ${task}: it is no classifier of texts`);
}

/** Throw where the graph of `manifest` is no classifier of tokens. */
export function checkTokenClassifier({ task }) {
  if (task !== "token-classification") throw new UsageError(`this bundle is for ${task}: it is no classifier of tokens`);
}

/** The logits, a Float32Array for each of `rows`, which are as `generate` takes them. */
export async function classify(graph, manifest, rows, stackOf) {
  return (await encodeRows(graph, manifest, rows, stackOf, "logits")).map(({ data }) => data);
}

/**
 * For each of `rows` its tokens, special ones left out: { id, token, logits, label, score }.
 *
 * A row has `parts`, as wordsOf gives them, and `labels`: the names of the outputs, or null where nothing
 * declares them.
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

/** The number of the largest of `logits`, and its probability. */
function likeliest(logits) {
  const best = logits.indexOf(Math.max(...logits));
  const sum = logits.reduce((total, logit) => total + Math.exp(logit - logits[best]), 0);
  return { best, score: 1 / sum };
}
