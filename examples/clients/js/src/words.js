// Separates the tokens of a text from the special tokens around them.
import { BundleError } from "./errors.js";

/**
 * The tokens of `text` and the special tokens around it: { before, own, after } with lists of ids, and
 * `words`, its own tokens as in the vocabulary. The text is truncated at its end, so that there are at most
 * `longest` tokens in total.
 */
export function wordsOf(texts, text, longest = Infinity) {
  const whole = texts.encode(text);
  const { ids, tokens } = texts.encodeWords(text);
  if (!ids.length) return { before: whole, own: [], after: [], words: [] };
  const begin = whole.findIndex((_, start) => ids.every((id, index) => whole[start + index] === id));
  if (begin < 0 || begin + ids.length > whole.length) {
    throw new BundleError("the tokenizer changes the tokens of a text where it adds special ones: use Python");
  }
  const before = whole.slice(0, begin);
  const after = whole.slice(begin + ids.length);
  const room = Math.max(0, longest - before.length - after.length);
  return { before, own: ids.slice(0, room), after, words: tokens.slice(0, room) };
}

/** All ids in the result of `wordsOf`, in order. */
export function idsOf({ before, own, after }) {
  return [...before, ...own, ...after];
}
