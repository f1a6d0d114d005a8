// A text as tokens that know which of them are the text's own.
import { BundleError } from "./errors.js";

/**
 * The tokens of `text` between the special ones that a tokenizer puts around it: { before, own, after }
 * with lists of ids, and `words`, the own ones as the vocabulary has them. At most `longest` tokens
 * together: the text is cut at its end.
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

/** The ids of what `wordsOf` gives, one behind the other. */
export function idsOf({ before, own, after }) {
  return [...before, ...own, ...after];
}
