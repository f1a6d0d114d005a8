// Swap adapters in Node, on a bundle of `loradeploy export --required-inputs`.
//
//     npm install --ignore-scripts && node main.mjs BUNDLE TOKEN,TOKEN,…
//
// (The install script of onnxruntime-node downloads a GPU library; the CPU library is in the package.)
// Prints the next token for the base and every adapter, and the largest difference from the base's logits.
import { existsSync, readFileSync, readdirSync } from "node:fs";
import { basename, join } from "node:path";
import * as ort from "onnxruntime-node";

const [bundle, tokens] = process.argv.slice(2);
if (!/^\d+(,\d+)*$/.test(tokens ?? "") || !existsSync(join(bundle, "required.onnx"))) {
  console.error("give a bundle of `loradeploy export --required-inputs`, and tokens as 5,6,7");
  process.exit(2);
}

// Tensor types and arrays by dtype; float16, which Node does not have, is stored as its bits.
const KINDS = {
  F32: ["float32", Float32Array],
  F16: ["float16", Uint16Array],
  I64: ["int64", BigInt64Array],
};
const CACHES = { float32: Float32Array, float16: Uint16Array };

function fromHalf(bits) {
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
  return bits & 0x8000 ? -size : size;
}

// A safetensors file: the length of the header in 8 bytes, the header as JSON, then the tensors' data.
function sideInputs(file) {
  const bytes = readFileSync(file);
  const length = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString("utf8", 8, 8 + length));
  delete header.__metadata__;
  const feeds = {};
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
    const [begin, end] = data_offsets.map((offset) => 8 + length + offset);
    const copy = new Uint8Array(bytes.subarray(begin, end)).buffer;
    const [type, Numbers] = KINDS[dtype];
    feeds[name] = new ort.Tensor(type, new Numbers(copy), shape);
  }
  return feeds;
}

const ids = tokens.split(",").map(BigInt);
const int64 = (numbers) =>
  new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);
const manifest = JSON.parse(readFileSync(join(bundle, "loradeploy.json"), "utf8"));
const feeds = {
  input_ids: int64(ids),
  attention_mask: int64(ids.map(() => 1)),
  position_ids: int64(ids.map((_, position) => position)),
};
for (const { name, dtype, shape } of manifest.inputs) {
  if (name.startsWith("past_key_values.")) {
    feeds[name] = new ort.Tensor(dtype, new CACHES[dtype](0), [1, shape[1], 0, shape[3]]);
  }
}

const session = await ort.InferenceSession.create(join(bundle, "required.onnx"));
const files = readdirSync(join(bundle, "adapters")).filter((file) => file.endsWith(".safetensors"));
let base;
for (const file of ["required.safetensors", ...files.sort().map((file) => join("adapters", file))]) {
  const { logits } = await session.run({ ...feeds, ...sideInputs(join(bundle, file)) }, ["logits"]);
  const bits = logits.data.subarray(-logits.dims[2]);
  const last = bits instanceof Uint16Array ? Float32Array.from(bits, fromHalf) : Float32Array.from(bits);
  base ??= last;
  const token = last.indexOf(Math.max(...last));
  const distance = Math.max(...last.map((value, index) => Math.abs(value - base[index])));
  const name = file === "required.safetensors" ? "base" : basename(file, ".safetensors");
  console.log(JSON.stringify({ name, token, distance, largest: last[token] }));
}
