// Converts rows of tokens to the inputs of a graph.

/** A list of rows of equal length as int64 [rows, columns]. */
export function int64(rows) {
  const data = new BigInt64Array(rows.length * rows[0].length);
  rows.forEach((row, index) => data.set(row.map(BigInt), index * row.length));
  return { type: "int64", data, dims: [rows.length, rows[0].length] };
}

/** `rows` of tokens padded to the same length, and their attention mask. */
export function padded(rows, padId, side) {
  const longest = Math.max(...rows.map((row) => row.length));
  const fill = (row, value) => Array(longest - row.length).fill(value);
  const pad = (row, value) => (side === "left" ? [...fill(row, value), ...row] : [...row, ...fill(row, value)]);
  return {
    ids: rows.map((row) => pad(row, padId)),
    mask: rows.map((row) => pad(row.map(() => 1), 0)),
  };
}

/** Group `rows`, by index, into batches: all together, or only rows of equal length if `side` is "none". */
export function together(rows, side) {
  if (side !== "none") return [[...rows.keys()]];
  const lengths = new Map();
  rows.forEach((row, number) => lengths.set(row.length, [...(lengths.get(row.length) ?? []), number]));
  return [...lengths.values()];
}

/** The positions of the last `length` tokens, from the mask of all tokens; padding is not counted. */
export function positionsOf(mask, length) {
  return mask.map((row) => {
    let seen = 0;
    return row.map((real) => Math.max((seen += real) - 1, 0)).slice(-length);
  });
}
