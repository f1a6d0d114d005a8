// 16-bit floats. float16 values are stored as bits in a Uint16Array, since older JavaScript has no float16.

const float = new Float32Array(1);
const bits = new Uint32Array(float.buffer);

/** The value of the float16 with these bits. */
export function fromHalf(half) {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >> 10) & 31;
  const fraction = half & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** The bits of the float16 nearest to a float32; ties round to even. */
export function toHalf(value) {
  float[0] = value;
  const sign = (bits[0] >>> 16) & 0x8000;
  const size = Math.abs(float[0]);
  if (Number.isNaN(size)) return sign | 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  if (size < 2 ** -14) return sign | evenly(size * 2 ** 24);
  const exponent = Math.floor(Math.log2(size));
  // A carry of the fraction correctly increments the exponent.
  return sign | (((exponent + 15) << 10) + evenly((size / 2 ** exponent - 1) * 1024));
}

function evenly(value) {
  const down = Math.floor(value);
  const rest = value - down;
  return rest > 0.5 || (rest === 0.5 && down % 2) ? down + 1 : down;
}

/** The float32 values of a bfloat16's bits. */
export function fromBrain(brain) {
  const wide = new Uint32Array(brain.length);
  for (let i = 0; i < brain.length; ++i) wide[i] = brain[i] << 16;
  return new Float32Array(wide.buffer);
}

/** Zeros of a graph's dtype. */
export function zeros(dtype, length) {
  return dtype === "float16" ? new Uint16Array(length) : new Float32Array(length);
}

/** float32 `values` in a graph's dtype. */
export function cast(values, dtype) {
  return dtype === "float16" ? Uint16Array.from(values, toHalf) : values;
}

/** A tensor's data as float32; float16 data is bits, or a Float16Array if JavaScript has it. */
export function floats(data) {
  if (data instanceof Float32Array) return data;
  return data instanceof Uint16Array ? Float32Array.from(data, fromHalf) : Float32Array.from(data);
}

// Near the square root of float32's largest number: products of larger values overflow.
const LARGEST = 1e18;

/** Whether all `values`, float32 or float16 bits, are finite and small enough to compute with. */
export function computable(values) {
  if (values instanceof Uint16Array) return values.every((half) => (half & 0x7c00) !== 0x7c00);
  return values.every((value) => Math.abs(value) <= LARGEST); // false for NaN
}
