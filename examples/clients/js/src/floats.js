// Numbers of 16 bits: float16, which older JavaScript lacks, is kept as its bits in a Uint16Array.

const float = new Float32Array(1);
const bits = new Uint32Array(float.buffer);

/** The float32 that the float16 of these bits is. */
export function fromHalf(half) {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >> 10) & 31;
  const fraction = half & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** The bits of the float16 nearest to a float32; halfway cases go to the even one. */
export function toHalf(value) {
  float[0] = value;
  const sign = (bits[0] >>> 16) & 0x8000;
  const size = Math.abs(float[0]);
  if (Number.isNaN(size)) return sign | 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  if (size < 2 ** -14) return sign | evenly(size * 2 ** 24);
  const exponent = Math.floor(Math.log2(size));
  // The fraction's carry goes into the exponent, as it should.
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

/** A tensor's data as float32: of float16 it is bits, or a Float16Array where there is one. */
export function floats(data) {
  if (data instanceof Float32Array) return data;
  return data instanceof Uint16Array ? Float32Array.from(data, fromHalf) : Float32Array.from(data);
}

// Near the root of float32's largest number: products of what is larger are no numbers.
const LARGEST = 1e18;

/** Whether a model can compute with all of `values`, float32 or a float16's bits. */
export function computable(values) {
  if (values instanceof Uint16Array) return values.every((half) => (half & 0x7c00) !== 0x7c00);
  return values.every((value) => Math.abs(value) <= LARGEST); // false for NaN
}
