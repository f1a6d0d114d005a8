// Rows of tokens as the inputs of a graph.

/** int64 [rows, columns] of a list of rows. */
export function int64(rows) {
  const data = new BigInt64Array(rows.length * rows[0].length);
  rows.forEach((row, index) => data.set(row.map(BigInt), index * row.length));
  return { type: "int64", data, dims: [rows.length, rows[0].length] };
}

/** `rows` of tokens padded to one length, and the mask of what is no padding. */
export function padded(rows, padId, side) {
  const longest = Math.max(...rows.map((row) => row.length));
  const fill = (row, value) => Array(longest - row.length).fill(value);
  const pad = (row, value) => (side === "left" ? [...fill(row, value), ...row] : [...row, ...fill(row, value)]);
  return {
    ids: rows.map((row) => pad(row, padId)),
    mask: rows.map((row) => pad(row.map(() => 1), 0)),
  };
}

/** Which of `rows`, by number, may share a run: all, or without padding those of one length. */
export function together(rows, side) {
  if (side !== "none") return [[...rows.keys()]];
  const lengths = new Map();
  rows.forEach((row, number) => lengths.set(row.length, [...(lengths.get(row.length) ?? []), number]));
  return [...lengths.values()];
}

/** Each new token's position in its row, by the mask of all tokens; padding takes none. */
export function positionsOf(mask, length) {
  return mask.map((row) => {
    let seen = 0;
    return row.map((real) => Math.max((seen += real) - 1, 0)).slice(-length);
  });
}
