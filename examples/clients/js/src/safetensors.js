// Reads safetensors files; the whole header is validated before any data is used.
import { fromBrain, fromHalf } from "./floats.js";
import { parsed } from "./source.js";

const SIZES = { F64: 8, F32: 4, F16: 2, BF16: 2, I64: 8, I32: 4, I16: 2, I8: 1, U8: 1, BOOL: 1 };
const LONGEST_HEADER = 100_000_000;

/**
 * The tensors, a Map of name → { dtype, shape, bytes }, and the metadata in the bytes `file`.
 *
 * Throws a `Problem` if the header does not match the data: offsets leave a gap or overlap, a size does
 * not match its shape, or the file is truncated.
 */
export function readTensors(file, where, Problem) {
  const refuse = (problem) => {
    throw new Problem(`${where} is not a valid safetensors file: ${problem}`);
  };
  if (file.length < 8) refuse(`it has ${file.length} bytes`);
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const length = Number(view.getBigUint64(0, true));
  if (length > LONGEST_HEADER) refuse(`a header of ${length} bytes`);
  if (8 + length > file.length) refuse(`it ends after ${file.length} bytes, in its header`);
  const text = new TextDecoder().decode(file.subarray(8, 8 + length));
  const { __metadata__: metadata = {}, ...entries } = parsed(text, where, Problem);
  const data = file.subarray(8 + length);
  const tensors = new Map();
  const ranges = [];
  for (const [name, entry] of Object.entries(entries)) {
    const { dtype, shape, data_offsets: offsets } = entry ?? {};
    const whole = (values) =>
      Array.isArray(values) && values.every((value) => Number.isSafeInteger(value) && value >= 0);
    if (!Object.hasOwn(SIZES, dtype)) refuse(`${name} has the dtype ${dtype}`);
    if (!whole(shape) || !whole(offsets) || offsets.length !== 2) refuse(`the entry of ${name}`);
    const [begin, end] = offsets;
    const size = shape.reduce((product, side) => product * side, SIZES[dtype]);
    if (end - begin !== size) refuse(`${name} [${shape}] has ${end - begin} bytes`);
    tensors.set(name, { dtype, shape, bytes: data.subarray(begin, end) });
    ranges.push([begin, end, name]);
  }
  let reached = 0;
  for (const [begin, end, name] of ranges.sort((a, b) => a[0] - b[0] || a[1] - b[1])) {
    if (begin !== reached) refuse(`the numbers of ${name} begin at ${begin}, not at ${reached}`);
    reached = end;
  }
  if (reached !== data.length) refuse(`it has ${data.length} bytes of numbers, its header says ${reached}`);
  return { tensors, metadata };
}

/** The values of a floating-point tensor as float32; null for other dtypes. */
export function asFloats({ dtype, bytes }) {
  const { buffer } = new Uint8Array(bytes); // a copy is aligned
  if (dtype === "F32") return new Float32Array(buffer);
  if (dtype === "F16") return Float32Array.from(new Uint16Array(buffer), fromHalf);
  if (dtype === "BF16") return fromBrain(new Uint16Array(buffer));
  return dtype === "F64" ? Float32Array.from(new Float64Array(buffer)) : null;
}

/** The values in their stored dtype: float32, or float16 bits; null for other dtypes. */
export function asStored({ dtype, bytes }) {
  const { buffer } = new Uint8Array(bytes);
  if (dtype === "F32") return { dtype: "float32", data: new Float32Array(buffer) };
  return dtype === "F16" ? { dtype: "float16", data: new Uint16Array(buffer) } : null;
}
