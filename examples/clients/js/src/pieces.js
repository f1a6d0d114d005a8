// Decodes text from tokens that arrive one by one.

/**
 * Return a function that takes the next token and returns the text that is now complete, possibly "";
 * without a token, it returns the rest. A piece that ends in an incomplete character is held back. Each
 * piece is decoded together with the previous one, which decides about a space between them.
 */
export function pieces(texts) {
  const ids = [];
  let context = 0; // index of the first token of the previous piece
  let given = 0; // number of tokens whose text has been returned
  return (token) => {
    if (token !== undefined) ids.push(token);
    const before = texts.decode(ids.slice(context, given));
    const after = texts.decode(ids.slice(context));
    if (token !== undefined && after.endsWith("\uFFFD")) return "";
    context = given;
    given = ids.length;
    return after.slice(before.length);
  };
}
