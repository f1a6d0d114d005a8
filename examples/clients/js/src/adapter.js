// Reads an adapter's side inputs from its files, and checks them against the bundle.
import { AdapterError, listed } from "./errors.js";
import { cast, computable } from "./floats.js";
import { readOnnxAdapter } from "./onnx_adapter.js";
import { peftSideInputs, readConfig } from "./peft.js";
import { readTensors } from "./safetensors.js";
import { LIMITS, openSource } from "./source.js";

const CONFIG = "adapter_config.json";
const WEIGHTS = "adapter_model.safetensors";
const BASE_DIGEST = "loradeploy.base_digest";

/**
 * The side inputs of the adapter at `place`, a Map of name → { shape, data } in the graph's dtype.
 *
 * `place`: an .onnx_adapter file, a PEFT directory, or its .safetensors file with the config in the
 * same directory; a path in Node, a URL anywhere.
 */
export async function readAdapter(place, manifest) {
  if (manifest.sideInputs.size === 0) {
    throw new AdapterError("this bundle is merged and does not take adapters: export the base without --merge");
  }
  const { directory, file } = split(String(place));
  const source = openSource(directory);
  if (file.endsWith(".onnx_adapter")) return readNative(source, file, manifest);
  return readPeft(source, file || WEIGHTS, manifest);
}

/** The directory of an adapter, which may have a tokenizer; null for an .onnx_adapter file. */
export function directoryOf(place) {
  const { directory, file } = split(String(place));
  return file.endsWith(".onnx_adapter") ? null : directory;
}

function split(place) {
  const [, directory, file] = /^(?:(.*)[/\\])?([^/\\]*)$/s.exec(place);
  if (/\.(onnx_adapter|safetensors)$/.test(file)) return { directory: directory ?? ".", file };
  if (/\.(bin|pt|pth|ckpt|gguf)$/.test(file)) {
    throw new AdapterError(`${place} is refused: give an .onnx_adapter file, or PEFT's safetensors`);
  }
  return { directory: place.replace(/[/\\]$/, ""), file: "" };
}

/** The side inputs of the adapter `name` in the bundle `source`. */
export function readOwnAdapter(source, name, manifest) {
  return readNative(source, `adapters/${encodeName(source, name)}.onnx_adapter`, manifest);
}

function encodeName(source, name) {
  if (/[/\\]|^\.\.?$/.test(name)) throw new AdapterError(`the adapter name ${JSON.stringify(name)}`);
  return source.base ? encodeURIComponent(name) : name;
}

async function readNative(source, file, manifest) {
  const where = source.where(file);
  const arrays = readOnnxAdapter(await source.bytes(file, LIMITS.adapter, AdapterError), where, AdapterError);
  arrays.delete("adapter_mode"); // for the graph that the file was written for; `stack` sets it
  return checked(arrays, manifest, where);
}

async function readPeft(source, file, manifest) {
  const where = source.where(file);
  const values = await source.json(CONFIG, AdapterError);
  const config = readConfig(values, source.where(CONFIG));
  const bytes = await source.bytes(file, LIMITS.adapter, AdapterError);
  const { tensors, metadata } = readTensors(bytes, where, AdapterError);
  const theirs = metadata[BASE_DIGEST];
  const ours = manifest.base.kind === "checkpoint" ? manifest.base.digest : null;
  if (theirs && ours && theirs !== ours) {
    throw new AdapterError(
      `${where}: the adapter was trained on another base (digest ${theirs}, this bundle's is ${ours})`,
    );
  }
  const dtype = manifest.factor_dtype;
  const found = peftSideInputs(config, tensors, manifest, where);
  const arrays = new Map();
  for (const [name, { shape, data }] of found) arrays.set(name, { dtype, shape, data: cast(data, dtype) });
  return checked(arrays, manifest, where);
}

/** Return `arrays` if they are one slot of side inputs, else throw an AdapterError with all problems. */
function checked(arrays, manifest, where) {
  const problems = [];
  const ranks = new Map();
  for (const { module, lora_A, lora_B } of manifest.targets) {
    if (arrays.has(lora_A) !== arrays.has(lora_B)) problems.push(`${module} has one factor without the other`);
    const rank = arrays.get(lora_A)?.shape.at(-1);
    ranks.set(lora_A, rank).set(lora_B, rank);
  }
  for (const { input, parameter, lacking } of manifest.saved) {
    if (lacking && !arrays.has(input)) {
      problems.push(`${parameter} is missing, and the base does not have it either`);
    }
  }
  for (const [name, { dtype, shape, data }] of arrays) {
    const expected = manifest.sideInputs.get(name);
    if (expected === undefined) {
      problems.push(`${name} is not a side input of this bundle`);
      continue;
    }
    const sizes = { adapters: 1, rank: ranks.get(name) };
    const needed = expected.shape.map((size) => sizes[size] ?? size);
    if (dtype !== manifest.factor_dtype || String(shape) !== String(needed)) {
      problems.push(`${name} is ${dtype} [${shape}], the bundle takes ${manifest.factor_dtype} [${needed}]`);
    } else if (!computable(data)) {
      problems.push(`${name} has values that are not finite, or too large to compute with`);
    }
  }
  if (arrays.size === 0) problems.push("it has no side inputs");
  if (problems.length) {
    throw new AdapterError(`${where}: the adapter does not fit this bundle: ${listed(problems)}`);
  }
  return arrays;
}
