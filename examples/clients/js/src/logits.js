// Chooses the next token from logits: settings of generation_config.json, greedy decoding, sampling.
import { BundleError, UsageError } from "./errors.js";

/**
 * The settings in a generation_config.json that also apply without sampling, as transformers defines
 * them, and its top_k and top_p.
 */
export function readSettings(values, where) {
  const number = (name, fallback, fits) => {
    const value = values[name] ?? fallback;
    if (!fits(value)) throw new BundleError(`${where}: ${name} is ${JSON.stringify(value)}`);
    return value;
  };
  const count = (value) => Number.isSafeInteger(value) && value >= 0;
  const tokens = (name) => {
    const listed = [values[name] ?? []].flat();
    if (!listed.every(Number.isSafeInteger)) throw new BundleError(`${where}: ${name} is not a list of tokens`);
    return listed.filter((token) => token >= 0);
  };
  return {
    repetitionPenalty: number("repetition_penalty", 1, (value) => Number.isFinite(value) && value > 0),
    noRepeatNgramSize: number("no_repeat_ngram_size", 0, count),
    minNewTokens: number("min_new_tokens", 0, count),
    suppress: tokens("suppress_tokens"),
    suppressFirst: tokens("begin_suppress_tokens"),
    topK: count(values.top_k) ? values.top_k : 0,
    topP: values.top_p > 0 && values.top_p <= 1 ? values.top_p : 1,
  };
}

/** Change `scores`, the logits of one row after `prompt` and the generated tokens `made`, in place. */
export function adjust(scores, settings, prompt, made, ends) {
  const before = [...prompt, ...made];
  const { repetitionPenalty: penalty, noRepeatNgramSize: size } = settings;
  if (penalty !== 1) {
    for (const token of new Set(before)) {
      if (token < scores.length) scores[token] = scores[token] < 0 ? scores[token] * penalty : scores[token] / penalty;
    }
  }
  const last = size ? before.slice(before.length - size + 1) : [];
  for (let start = 0; size && start + size <= before.length; ++start) {
    const repeats = last.every((token, index) => before[start + index] === token);
    if (repeats) scores[before[start + size - 1]] = -Infinity;
  }
  const barred = [...settings.suppress];
  if (made.length < settings.minNewTokens) barred.push(...ends);
  if (!made.length) barred.push(...settings.suppressFirst);
  for (const token of barred) if (token < scores.length) scores[token] = -Infinity;
}

/** The sampling options; temperature 0 is greedy. Throws UsageError for a value out of range. */
export function readSampling({ temperature = 0, topK, topP, seed = 0 }) {
  if (!(Number.isFinite(temperature) && temperature >= 0)) throw new UsageError(`temperature is ${temperature}: give 0 (greedy) or more`);
  if (topK !== undefined && !(Number.isSafeInteger(topK) && topK >= 0)) throw new UsageError(`topK is ${topK}: give 0 (all tokens) or more`);
  if (topP !== undefined && !(topP > 0 && topP <= 1)) throw new UsageError(`topP is ${topP}: give more than 0 and at most 1`);
  if (!Number.isSafeInteger(seed) || seed < 0) throw new UsageError(`seed is ${seed}: give a whole number of 0 or more`);
  if (temperature === 0 && (topK || (topP ?? 1) < 1)) {
    throw new UsageError("topK and topP have no effect at temperature 0: give a temperature");
  }
  return { temperature, topK, topP, seed };
}

/** The next token for `scores`; the function `random` returns numbers in [0, 1). */
export function choose(scores, { temperature, topK, topP }, settings, random) {
  if (temperature === 0) return scores.reduce((best, score, token) => (score > scores[best] ? token : best), 0);
  const most = scores.reduce((largest, score) => Math.max(largest, score), -Infinity);
  const order = Array.from(scores.keys()).sort((one, other) => scores[other] - scores[one] || one - other);
  const weight = (token) => Math.exp((scores[token] - most) / temperature);
  const kept = order.slice(0, (topK ?? settings.topK) || order.length);
  const mass = kept.reduce((sum, token) => sum + weight(token), 0) * (topP ?? settings.topP);
  let reached = 0;
  const end = kept.findIndex((token) => (reached += weight(token)) >= mass);
  const likely = end < 0 ? kept : kept.slice(0, end + 1);
  let left = random() * likely.reduce((sum, token) => sum + weight(token), 0);
  return likely.find((token) => (left -= weight(token)) < 0) ?? likely.at(-1);
}

/** A function that returns random numbers in [0, 1), reproducible by seed (mulberry32). */
export function randomOf(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
