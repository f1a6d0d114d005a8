// Text from tokens that arrive one by one.

/**
 * A function (token) → the text that is complete with it, perhaps none; without a token it gives the
 * rest. A piece waits while its end is half a character, and is decoded behind those before it, which
 * decide about a space at its beginning.
 */
export function pieces(texts) {
  const ids = [];
  let context = 0; // where the last piece began
  let given = 0; // up to where all has been given
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
