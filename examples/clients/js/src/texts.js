// Converts text to tokens and back, with the base's files or those of an adapter.
//
//     tokenizer.json, tokenizer_config.json      the vocabulary and its rules; the special tokens
//     chat_template.jinja                        conversations to text
//     generation_config.json                     which tokens end a text, and settings
//     config.json                                how many positions the model has
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import { AdapterError, BundleError, UsageError } from "./errors.js";
import { readSettings } from "./logits.js";
import { LIMITS, openSource, parsed } from "./source.js";

const ROLES = ["bos", "eos", "unk", "sep", "pad", "cls", "mask"].map((role) => `${role}_token`);
const POSITIONS = ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length"];
// transformers writes 10³⁰ for a tokenizer without a limit.
const NO_LIMIT = 1e9;
const MAX_TEMPLATE = 128 * 1024;
// The parts of tokenizer.json that determine tokens and texts.
const WORDS = ["model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"];

/**
 * The tokenizer, chat template and settings of one adapter, or of the base.
 *
 * `ends`: a Set of the tokens that end a text. `settings`: changes of the logits before a token is
 * chosen. `padId`: the padding token. `maxLength`: the largest number of tokens, or Infinity.
 * `labels`: the label names of a classifier, or null.
 */
class Texts {
  constructor(parts) {
    Object.assign(this, parts);
    this.tokenizer = new Tokenizer(this.words, { ...this.tokenizerConfig, clean_up_tokenization_spaces: false });
  }

  encode(text, special = true) {
    if (!text.isWellFormed()) throw new UsageError("a text contains half of a surrogate pair");
    return this.tokenizer.encode(text, { add_special_tokens: special }).ids;
  }

  /** The tokens of a text without special tokens: { ids, tokens }, as ids and as in the vocabulary. */
  encodeWords(text) {
    const { ids, tokens } = this.tokenizer.encode(text, { add_special_tokens: false });
    return { ids, tokens };
  }

  /** The tokens of a conversation, up to the beginning of the assistant's answer. */
  encodeChat(messages) {
    if (this.template === null) throw new UsageError("there is no chat template: give plain prompts");
    for (const message of messages) {
      if (typeof message?.role !== "string") throw new UsageError('a message has no role: give {role: "user", content: "…"}');
    }
    let text;
    try {
      const values = { ...this.special, messages, tools: null, documents: null, add_generation_prompt: true };
      text = new Template(this.template).render(values);
    } catch (problem) {
      throw new UsageError(`the chat template fails on the messages: ${problem.message}`);
    }
    return this.encode(text, false);
  }

  /** The text of `ids`, without special tokens. */
  decode(ids) {
    if (!ids.length) return ""; // the library does not accept an empty list
    return this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }
}

/** The base's texts, from the bundle `source`. */
export async function readTexts(source, manifest) {
  const words = parsed(
    await source.text("tokenizer.json", LIMITS.tokenizer, BundleError),
    source.where("tokenizer.json"),
    BundleError,
  );
  const [config, tokenizerConfig, generation] = await Promise.all(
    ["config.json", "tokenizer_config.json", "generation_config.json"].map((name) =>
      manifest.files.includes(name) ? source.json(name, BundleError) : {},
    ),
  );
  const special = specialTokens(tokenizerConfig);
  const template = manifest.files.includes("chat_template.jinja")
    ? await source.text("chat_template.jinja", MAX_TEMPLATE, BundleError)
    : ownTemplate(tokenizerConfig);
  const idOf = (role) => words.added_tokens?.find(({ content }) => content === special[role])?.id ?? words.model?.vocab?.[special[role]];
  const declared = [ids(generation.eos_token_id), ids(config.eos_token_id), ids(idOf("eos_token"))];
  const ends = new Set(declared.find((some) => some.length) ?? []);
  const vocabulary = config.vocab_size ?? config.text_config?.vocab_size ?? Infinity;
  const pads = [...ids(config.pad_token_id), ...ids(idOf("pad_token")), ...ends, 0];
  return new Texts({
    words,
    tokenizerConfig,
    special,
    template,
    ends,
    vocabulary,
    padId: pads.find((id) => id < vocabulary),
    maxLength: longest(config, tokenizerConfig),
    labels: manifest.merged_adapter?.labels ?? labelsOf(config),
    settings: readSettings(generation, source.where("generation_config.json")),
  });
}

/**
 * The texts of the adapter `name` in the bundle, from its entry in the manifest and the files in its
 * directory.
 */
export async function readOwnTexts(source, name, manifest, base) {
  const entry = manifest.adapters[name];
  const own = entry?.text;
  if (!own) return base;
  const file = async (what) =>
    Object.hasOwn(own.files, what)
      ? parsed(await source.text(`${entry.path}/${what}`, LIMITS.tokenizer, BundleError), what, BundleError)
      : null;
  const tokenizerConfig = await file("tokenizer_config.json");
  const where = `the generation settings of the adapter ${name}`;
  return new Texts({
    ...base,
    words: (await file("tokenizer.json")) ?? base.words,
    tokenizerConfig: tokenizerConfig ?? base.tokenizerConfig,
    special: { ...base.special, ...specialTokens(tokenizerConfig ?? {}) },
    template: own.chat_template ?? base.template,
    ends: own.eos_token_ids.length ? new Set(own.eos_token_ids) : base.ends,
    settings: Object.hasOwn(own.files, "generation_config.json") ? readSettings(own.generation, where) : base.settings,
  });
}

/**
 * Throw AdapterError if the files in `directory` differ from the base's tokenizer, template or settings:
 * the client supports these only for adapters that were exported with the bundle.
 */
export async function checkSameTexts(directory, base) {
  const source = openSource(directory);
  const refuse = (file) => {
    throw new AdapterError(
      `${source.where(file)} differs from the base's: export the adapter with the` +
        " bundle (loradeploy export --adapter)",
    );
  };
  const same = (one, other) => JSON.stringify(one ?? null) === JSON.stringify(other ?? null);
  const read = (file) => source.optionalJson(file, AdapterError);
  const words = await source.optionalText("tokenizer.json", LIMITS.tokenizer, AdapterError);
  if (words !== null) {
    const own = parsed(words, source.where("tokenizer.json"), AdapterError);
    if (!WORDS.every((part) => same(own[part], base.words[part]))) refuse("tokenizer.json");
  }
  const config = await read("tokenizer_config.json");
  if (!Object.entries(specialTokens(config)).every(([role, token]) => base.special[role] === token)) {
    refuse("tokenizer_config.json");
  }
  const template = await source.optionalText("chat_template.jinja", MAX_TEMPLATE, AdapterError);
  if (template !== null && template !== base.template) refuse("chat_template.jinja");
  if (template === null && (ownTemplate(config) ?? base.template) !== base.template) refuse("tokenizer_config.json");
  const generation = await read("generation_config.json");
  if (Object.keys(generation).length) {
    const ends = ids(generation.eos_token_id);
    const settings = readSettings(generation, source.where("generation_config.json"));
    const sameEnds = !ends.length || same(ends.sort(), [...base.ends].sort());
    if (!sameEnds || !same(settings, base.settings)) refuse("generation_config.json");
  }
}

function specialTokens(config) {
  const found = {};
  for (const role of ROLES) {
    const token = config[role]?.content ?? config[role];
    if (typeof token === "string") found[role] = token;
  }
  return found;
}

function ownTemplate({ chat_template: template = null }) {
  if (!Array.isArray(template)) return template;
  return template.find(({ name }) => name === "default")?.template ?? null;
}

function ids(value) {
  return [value ?? []].flat().filter((id) => Number.isSafeInteger(id) && id >= 0);
}

/** The label names in config.json, or null. */
function labelsOf({ id2label }) {
  if (!id2label || typeof id2label !== "object") return null;
  return Object.keys(id2label).sort((one, other) => one - other).map((key) => String(id2label[key]));
}

function longest(config, tokenizerConfig) {
  const model = POSITIONS.some((name) => config.text_config?.[name]) ? config.text_config : config;
  const positions = POSITIONS.map((name) => model[name]).find(Number.isSafeInteger) ?? Infinity;
  const own = tokenizerConfig.model_max_length;
  return Math.min(positions, typeof own === "number" && own < NO_LIMIT ? own : Infinity);
}
