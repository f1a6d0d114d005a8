// loradeploy.json: the inputs, outputs and target modules of a bundle's graph.
import { BundleError } from "./errors.js";

const NAME = "loradeploy.json";
const FORMAT = "loradeploy-bundle";
const FORMAT_VERSION = 2;
const DTYPES = ["float32", "float16"];
const PAST = "past_key_values.";

/**
 * The manifest of the bundle `source`; the fields that this package uses are validated.
 *
 * Fields in addition to those of the file: `graph`, the file to open; `past`, the inputs of the KV
 * cache; `sideInputs`, a Map of name → { shape, kind } where a size may be "adapters" or "rank".
 */
export async function readManifest(source) {
  const values = await source.json(NAME, BundleError);
  const refuse = (problem) => {
    throw new BundleError(`${source.where(NAME)}: ${problem}`);
  };
  if (values.format !== FORMAT) refuse(`the field 'format' is not '${FORMAT}'`);
  if (values.format_version !== FORMAT_VERSION) {
    refuse(
      `format version ${JSON.stringify(values.format_version)}, this client reads ${FORMAT_VERSION}:` +
        " export the bundle again, or use a client of its version",
    );
  }
  const merged = values.mode === "merged";
  if (!merged && values.mode !== "side-inputs") refuse(`mode is ${JSON.stringify(values.mode)}`);
  for (const name of ["inputs", "outputs", "targets", "saved", "changed", "files"]) {
    if (!Array.isArray(values[name])) refuse(`${name} is not a list`);
  }
  if (!merged && !values.files.includes("required.onnx")) {
    refuse(
      "the bundle has no required.onnx, which JavaScript needs: export it again with" +
        " --required-inputs",
    );
  }
  if (!DTYPES.includes(values.factor_dtype)) refuse(`factor_dtype is ${values.factor_dtype}`);
  if (!["slots", "rows"].includes(values.layout)) refuse(`layout is ${values.layout}`);
  if (!["left", "right", "none"].includes(values.padding)) refuse(`padding is ${values.padding}`);
  const past = values.inputs.filter(({ name }) => name.startsWith(PAST));
  for (const { name, dtype, shape } of past) {
    if (!DTYPES.includes(dtype) || shape.length !== 4) refuse(`${name} is ${dtype} [${shape}]`);
  }
  return {
    ...values,
    graph: merged ? "model.onnx" : "required.onnx",
    past,
    sideInputs: merged ? new Map() : sideInputs(values),
  };
}

/** The graph output that continues the cache of the graph input `past`. */
export function presentOf(past) {
  return past.replace(PAST, "present.");
}

function sideInputs({ targets, saved, changed }) {
  const found = new Map();
  for (const { lora_A, lora_B, in_features, out_features } of targets) {
    found.set(lora_A, { shape: ["adapters", in_features, "rank"], kind: "A" });
    found.set(lora_B, { shape: ["adapters", "rank", out_features], kind: "B" });
  }
  for (const { input, shape, transposed } of saved) {
    const own = transposed ? [...shape.slice(0, -2), shape.at(-1), shape.at(-2)] : shape;
    found.set(input, { shape: ["adapters", ...own], kind: "whole" });
  }
  for (const { scale, offset, size } of changed) {
    for (const name of [scale, offset]) {
      if (name) found.set(name, { shape: ["adapters", size], kind: "whole" });
    }
  }
  return found;
}
