// Converts a PEFT adapter, adapter_config.json and tensors, to the side inputs of a bundle.
import { AdapterError, listed } from "./errors.js";
import { asFloats } from "./safetensors.js";

const CONVERT =
  "write it for the bundle with loradeploy convert, and load the .onnx_adapter file";

// Fields that are supported, or that do not affect the results of a trained adapter.
const KNOWN = new Set(
  (
    "r lora_alpha target_modules lora_dropout bias use_rslora use_dora fan_in_fan_out rank_pattern" +
    " alpha_pattern exclude_modules layers_to_transform layers_pattern modules_to_save task_type" +
    " base_model_name_or_path init_lora_weights peft_type auto_mapping corda_config eva_config" +
    " ensure_weight_tying inference_mode loftq_config lora_ga_config megatron_core peft_version" +
    " qalora_group_size revision runtime_config velora_config"
  ).split(" "),
);
// Initializations that do not change the base weights.
const BASE_KEEPING = new Set([true, false, "gaussian", "eva", "orthogonal", "mica"]);

const PREFIX = /^(?:module\.)*(?:base_model\.model\.)+/;
// The range of a factor's largest number in which float16 has full precision down to a 64th of it.
const LEAST_HELD = 2 ** -8;
const MOST_HELD = 2 ** 15;
// Of A: x A has to fit into float16 too.
const MOST_A = 2;
const FACTOR = /^(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.(?!weight$)([^.]+))?(?:\.weight)?$/;
const WHOLE = /^(.+)\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?\.([^.]+)$/;
// A module's name or the end of one, as opposed to a regular expression; dots match any character.
const NAME = /^\^?(?:[A-Za-z0-9_.]|\\[.\-_])+$/;

/**
 * s of y = x Wᵀ + s · (x Aᵀ) Bᵀ for `module`: α/r, or α/√r with use_rslora.
 */
function scaling(config, module) {
  const rank = ofModule(config.rank_pattern, module) ?? config.r;
  const alpha = ofModule(config.alpha_pattern, module) ?? config.lora_alpha;
  return alpha / (config.use_rslora ? Math.sqrt(rank) : rank);
}

/** The value of the first pattern that matches `module`, or its end after a dot. */
function ofModule(patterns, module) {
  for (const [pattern, value] of Object.entries(patterns)) {
    if (new RegExp(`^(?:(?:.*\\.)?(?:${pattern}))$`).test(module)) return value;
  }
  return undefined;
}

function isOff(value) {
  return !value || (typeof value === "object" && Object.keys(value).length === 0);
}

/** The config's fields with PEFT's defaults; throws an error that names an unsupported field. */
export function readConfig(values, where) {
  const refuse = (problem) => {
    throw new AdapterError(`${where}: ${problem}`);
  };
  const shown = (name) => `${name}=${JSON.stringify(values[name])}`;
  if ((values.peft_type ?? "LORA") !== "LORA") refuse(`${shown("peft_type")}: only LORA is supported`);
  for (const [name, value] of Object.entries(values)) {
    if (!KNOWN.has(name) && !isOff(value)) {
      refuse(`${shown(name)} may change the numbers and is not supported here: ${CONVERT}`);
    }
  }
  if (values.use_dora) refuse(`${shown("use_dora")} is not supported here: ${CONVERT}`);
  if ((values.bias ?? "none") !== "none") refuse(`${shown("bias")} is not supported here: ${CONVERT}`);
  if (!BASE_KEEPING.has(values.init_lora_weights ?? true)) {
    refuse(`${shown("init_lora_weights")} changed the base weights: ${CONVERT}`);
  }
  const config = {
    r: values.r ?? refuse("r is missing"),
    lora_alpha: values.lora_alpha ?? refuse("lora_alpha is missing"),
    use_rslora: values.use_rslora ?? false,
    rank_pattern: values.rank_pattern ?? {},
    alpha_pattern: values.alpha_pattern ?? {},
  };
  const isRank = (value) => Number.isSafeInteger(value) && value > 0;
  if (!isRank(config.r)) refuse(`${shown("r")}, a positive integer is needed`);
  if (!Number.isFinite(config.lora_alpha)) refuse(`${shown("lora_alpha")}, a number is needed`);
  if (typeof config.use_rslora !== "boolean") refuse(`${shown("use_rslora")}, true or false is needed`);
  for (const [name, fits] of [["rank_pattern", isRank], ["alpha_pattern", Number.isFinite]]) {
    for (const [pattern, value] of Object.entries(config[name])) {
      if (!NAME.test(pattern)) refuse(`${name} has the expression ${JSON.stringify(pattern)}: ${CONVERT}`);
      if (!fits(value)) refuse(`${name} gives ${JSON.stringify(pattern)} the value ${JSON.stringify(value)}`);
    }
  }
  // Every targeted module must have tensors; this is only checked if target_modules alone defines the targets.
  const whole = isOff(values.exclude_modules) && isOff(values.layers_to_transform ?? null) && values.layers_to_transform !== 0;
  config.endings = whole && Array.isArray(values.target_modules) ? values.target_modules : [];
  return config;
}

/**
 * Rescale A [in, rank] and B [rank, out] in place, so that both have a good range for float16 and their
 * product is unchanged.
 *
 * The Python runtime does the same: after a short training, B is too small for float16's full precision,
 * and x A must not overflow if x A B does not.
 */
function balance(A, B, rank) {
  const high = B.length / rank;
  for (let k = 0; k < rank; k++) {
    let [topA, topB] = [0, 0];
    for (let i = k; i < A.length; i += rank) topA = Math.max(topA, Math.abs(A[i]));
    for (let i = k * high; i < (k + 1) * high; i++) topB = Math.max(topB, Math.abs(B[i]));
    const held = Math.min(topA, topB) >= LEAST_HELD && topB <= MOST_HELD && topA <= MOST_A;
    if (held || !(topA > 0 && topB > 0 && Number.isFinite(topA) && Number.isFinite(topB))) continue;
    const equal = Math.round(Math.log2(topB / topA) / 2);
    const most = Math.floor(Math.log2(MOST_A / topA)); // so that A is at most MOST_A
    const least = Math.ceil(Math.log2(topB / MOST_HELD)); // so that B is at most MOST_HELD
    const power = 2 ** Math.max(Math.min(equal, most), least);
    for (let i = k; i < A.length; i += rank) A[i] *= power;
    for (let i = k * high; i < (k + 1) * high; i++) B[i] /= power;
  }
}

/**
 * The side inputs of the adapter, a Map of name → { shape, data } in float32: `M.lora_A`
 * [1, in, rank] = Aᵀ and `M.lora_B` [1, rank, out] = s · Bᵀ, and parameters trained whole.
 *
 * `tensors`: the tensors of its file. All mismatches with `manifest` are in one error.
 */
export function peftSideInputs(config, tensors, manifest, where) {
  const modules = new Map();
  const whole = new Map();
  const names = new Set();
  const problems = [];
  for (const [key, tensor] of tensors) {
    const values = asFloats(tensor);
    if (values === null) {
      problems.push(`${key} has the dtype ${tensor.dtype}`);
      continue;
    }
    const stored = { shape: tensor.shape, values };
    const name = key.replace(PREFIX, "");
    const factor = FACTOR.exec(name);
    if (factor === null) {
      whole.set(name.replace(WHOLE, "$1.$2"), stored);
      continue;
    }
    const [, module, part, adapter] = factor;
    if (adapter) names.add(adapter);
    if (!modules.has(module)) modules.set(module, {});
    modules.get(module)[part] = stored;
  }
  if (names.size > 1) problems.push(`the file has several adapters: ${[...names].join(", ")}`);

  const targets = new Map(manifest.targets.map((target) => [target.module, target]));
  const found = new Map();
  for (const [module, parts] of modules) {
    const target = targets.get(module);
    if (target === undefined) {
      problems.push(`${module} is not a target module of this bundle`);
      continue;
    }
    const half = target.kind === "embedding" ? "lora_embedding_" : "lora_";
    const { [`${half}A`]: A, [`${half}B`]: B, ...others } = parts;
    if (!A || !B || Object.keys(others).length) {
      problems.push(`${module} has ${Object.keys(parts).join(" and ")}, ${half}A and ${half}B are needed`);
      continue;
    }
    const { in_features: wide, out_features: high } = target;
    const rank = ofModule(config.rank_pattern, module) ?? config.r;
    if (A.shape.length !== 2 || A.shape[0] !== rank || A.shape[1] !== wide) {
      problems.push(`${module}.lora_A is [${A.shape}], rank and base take [${rank},${wide}]`);
    } else if (B.shape.length !== 2 || B.shape[0] !== high || B.shape[1] !== rank) {
      problems.push(`${module}.lora_B is [${B.shape}], base and rank take [${high},${rank}]`);
    } else {
      const s = Math.fround(scaling(config, module));
      const first = transposed(A.values, rank, wide);
      // The product of two float32 is exact in a double, so storing it rounds once.
      const folded = transposed(B.values, high, rank).map((value) => value * s);
      if (manifest.factor_dtype === "float16") balance(first, folded, rank);
      found.set(target.lora_A, { shape: [1, wide, rank], data: first });
      found.set(target.lora_B, { shape: [1, rank, high], data: folded });
    }
  }
  for (const { module } of manifest.targets) {
    const targeted = config.endings.some((end) => module === end || module.endsWith(`.${end}`));
    if (targeted && !modules.has(module)) problems.push(`${module} is targeted and has no tensors`);
  }
  const replaceable = new Map(manifest.saved.map((saved) => [saved.parameter, saved]));
  for (const [parameter, { shape, values }] of whole) {
    const saved = replaceable.get(parameter);
    if (saved === undefined) {
      problems.push(`${parameter} is neither a factor nor a side input of this bundle: ${CONVERT}`);
    } else if (String(shape) !== String(saved.shape)) {
      problems.push(`${parameter} is [${shape}], the bundle takes [${saved.shape}]: ${CONVERT}`);
    } else if (saved.transposed) {
      if (shape.length !== 2) problems.push(`${parameter} is [${shape}]: ${CONVERT}`);
      else found.set(saved.input, { shape: [1, shape[1], shape[0]], data: transposed(values, ...shape) });
    } else {
      found.set(saved.input, { shape: [1, ...shape], data: values });
    }
  }
  if (problems.length) {
    throw new AdapterError(`${where}: the adapter does not fit this bundle: ${listed(problems)}`);
  }
  return found;
}

/** `values` [rows, columns] as [columns, rows]. */
function transposed(values, rows, columns) {
  const turned = new Float32Array(values.length);
  for (let row = 0; row < rows; ++row) {
    for (let column = 0; column < columns; ++column) {
      turned[column * rows + row] = values[row * columns + column];
    }
  }
  return turned;
}
