// Embeds texts: an encoder's states are pooled as described by the bundle's sentence-transformers files.
//
//     modules.json                        the modules: Transformer, Pooling, Dropout, Normalize
//     1_Pooling/config.json               the pooling of the tokens' states
//     sentence_bert_config.json, …        the longest text
//     config_sentence_transformers.json   prompts by name
import { encodeRows } from "./encode.js";
import { BundleError, UsageError } from "./errors.js";
import { LIMITS, parsed } from "./source.js";

const PACKAGE = "sentence_transformers.";
const ENCODERS = ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"].map((name) => `sentence_${name}_config.json`);
// The pooling modes in older files, in the order in which their vectors are concatenated.
const FLAGS = {
  pooling_mode_cls_token: "cls",
  pooling_mode_max_tokens: "max",
  pooling_mode_mean_tokens: "mean",
  pooling_mode_mean_sqrt_len_tokens: "mean_sqrt_len_tokens",
  pooling_mode_weightedmean_tokens: "weightedmean",
  pooling_mode_lasttoken: "lasttoken",
};
// Each maps the pooled states, a list of { place, state } with Float32Arrays, to a vector.
const POOLS = {
  cls: ([first]) => first.state,
  lasttoken: (states) => states.at(-1).state,
  max: (states) => states[0].state.map((_, index) => Math.max(...states.map(({ state }) => state[index]))),
  mean: (states) => summed(states, () => 1, (count) => count),
  mean_sqrt_len_tokens: (states) => summed(states, () => 1, Math.sqrt),
  weightedmean: (states) => summed(states, (place) => place + 1, (weight) => weight),
};

/** Throw UsageError unless the bundle is an embedder. */
export function checkEmbedder({ task }) {
  if (task !== "feature-extraction") throw new UsageError(`this bundle is for ${task}: it gives no embeddings`);
}

/**
 * The pooling recipe of the base, or of the adapter in `folder`; null if an adapter does not have its own:
 * { pooling, normalize, includePrompt, prompts, defaultPrompt, maxLength, size }.
 */
export async function readRecipe(source, folder = "", ofAdapter = false) {
  const usual = { pooling: ["mean"], normalize: true, includePrompt: true, prompts: {}, defaultPrompt: null, maxLength: Infinity };
  const read = (file) => source.optionalJson(folder + file, BundleError);
  const where = source.where(`${folder}modules.json`);
  const text = await source.optionalText(`${folder}modules.json`, LIMITS.json, BundleError);
  if (text === null) return ofAdapter ? null : usual;
  const modules = Object.values(parsed(`{"modules":${text}}`, where, BundleError).modules);
  const kinds = modules.map(({ type, path = "" }) => {
    if (typeof type !== "string" || !type.startsWith(PACKAGE)) throw new BundleError(`${where} names the module ${JSON.stringify(type)}, which is not of sentence-transformers`);
    return { kind: type.split(".").at(-1), path };
  });
  const [encoder, pooling, ...steps] = kinds;
  if (encoder?.kind !== "Transformer" || pooling?.kind !== "Pooling") throw new BundleError(`${where}: a Transformer and a Pooling have to come first: use Python`);
  const other = steps.find(({ kind }) => kind !== "Normalize" && kind !== "Dropout");
  if (other) throw new BundleError(`${where} names a module ${other.kind}, which this client does not compute: use Python`);
  const values = await read(`${pooling.path}/config.json`);
  const flags = Object.keys(values).filter((key) => key.startsWith("pooling_mode_") && values[key]);
  const given = values.pooling_mode ?? (flags.length ? Object.keys(FLAGS).filter((key) => flags.includes(key)).map((key) => FLAGS[key]) : "mean");
  const modes = [given].flat();
  const flagged = new Set(flags.map((flag) => FLAGS[flag] ?? flag));
  const contradicted = flagged.size > 0 && (flagged.size !== new Set(modes).size || modes.some((mode) => !flagged.has(mode)));
  if (!modes.length || contradicted) {
    const other = contradicted ? `, and ${flags.join(" and ")} say otherwise: keep one of them` : ": use Python";
    throw new BundleError(`${source.where(pooling.path)}: pooling_mode is ${JSON.stringify(given)}${other}`);
  }
  const unknown = modes.find((mode) => !Object.hasOwn(POOLS, mode)) ?? flags.find((flag) => !Object.hasOwn(FLAGS, flag));
  if (unknown !== undefined) throw new BundleError(`${source.where(pooling.path)}: the pooling ${JSON.stringify(unknown)} is not supported: use Python`);
  const limits = (await Promise.all(ENCODERS.map(read))).find((own) => Object.keys(own).length) ?? {};
  if (limits.do_lower_case === true) throw new BundleError(`${where}: do_lower_case is not supported: use Python`);
  const options = ["processing_kwargs", "processor_kwargs", "tokenizer_args"].find((name) => Object.keys(limits[name] ?? {}).length);
  if (options) throw new BundleError(`${where}: ${options} is not supported: use Python`);
  const { prompts = {}, default_prompt_name: defaultPrompt = null, truncate_dim: size } = await read("config_sentence_transformers.json");
  return {
    pooling: modes,
    normalize: steps.some(({ kind }) => kind === "Normalize"),
    includePrompt: values.include_prompt !== false,
    prompts,
    defaultPrompt,
    maxLength: limits.max_seq_length ?? Infinity,
    size: size ?? undefined,
  };
}

/** The prompt `name`, or the default prompt if it is undefined. */
export function promptOf({ prompts, defaultPrompt }, name = defaultPrompt) {
  if (name === null) return "";
  if (!Object.hasOwn(prompts, name)) {
    const known = Object.keys(prompts).join(", ") || "none";
    throw new UsageError(`no prompt is called ${JSON.stringify(name)}; there are: ${known}`);
  }
  return prompts[name] ?? "";
}

/**
 * The vectors, a Float32Array for each of `rows`. `skipped` of a row: number of tokens at its beginning
 * that are not pooled.
 */
export async function embed(graph, manifest, rows, stackOf, recipe) {
  const names = manifest.outputs.map(({ name }) => name);
  const output = names.find((name) => name === "last_hidden_state") ?? names[0];
  const found = await encodeRows(graph, manifest, rows, stackOf, output);
  return rows.map(({ prompt, skipped }, number) => {
    const { data, width, whole } = found[number];
    if (whole) throw new BundleError(`the graph gives ${output} for whole texts, which this client does not embed: use Python`);
    const states = prompt.map((_, place) => ({ place, state: data.subarray(place * width, (place + 1) * width) }));
    const counted = states.slice(skipped);
    if (!counted.length) throw new UsageError(`text ${number + 1} has no tokens after its prompt`);
    const vector = recipe.pooling.flatMap((mode) => Array.from(POOLS[mode](counted)));
    if (!vector.every(Number.isFinite)) throw new BundleError("the graph gave states that are not finite numbers");
    return Float32Array.from((recipe.normalize ? scaled(vector) : vector).slice(0, recipe.size));
  });
}

function summed(states, weightOf, divisorOf) {
  const total = new Float64Array(states[0].state.length);
  let weights = 0;
  for (const { place, state } of states) {
    const weight = weightOf(place);
    weights += weight;
    state.forEach((value, index) => (total[index] += weight * value));
  }
  return total.map((value) => value / divisorOf(weights));
}

function scaled(vector) {
  const length = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
  return vector.map((value) => value / Math.max(length, 1e-12));
}
