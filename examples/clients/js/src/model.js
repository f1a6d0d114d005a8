// An open bundle: its graph, its tokenizer and templates, and its adapters by name.
import { directoryOf, readAdapter, readOwnAdapter } from "./adapter.js";
import { openGraph } from "./backend.js";
import { blend, membersOf } from "./blend.js";
import { checkClassifier, checkTokenClassifier, classify, classifyTokens } from "./classify.js";
import { checkEmbedder, embed, promptOf, readRecipe } from "./embed.js";
import { checkEncoder } from "./encode.js";
import { AdapterError, UsageError, checkOptions } from "./errors.js";
import { checkDecoder, generate } from "./generate.js";
import { readSampling } from "./logits.js";
import { presentOf, readManifest } from "./manifest.js";
import { IN_NODE, openSource } from "./source.js";
import { readBase, stack } from "./stack.js";
import { checkSameTexts, readOwnTexts, readTexts } from "./texts.js";
import { idsOf, wordsOf } from "./words.js";

/** Open the bundle at `place`: a directory in Node, a URL anywhere. See index.d.ts. */
export async function load(place, options = {}) {
  checkOptions("load", options, ["backend", "onProgress"]);
  const source = openSource(place, options.onProgress);
  const manifest = await readManifest(source);
  const texts = await readTexts(source, manifest);
  const base = await readBase(source, manifest);
  const recipe = manifest.task === "feature-extraction" ? await readRecipe(source) : null;
  const backend = options.backend ?? (IN_NODE ? "node" : "wasm");
  const presents = manifest.past.map(({ name }) => presentOf(name));
  const graph = await openGraph(source, manifest, backend, presents);
  return new Model(source, manifest, texts, base, recipe, graph, backend);
}

class Model {
  #source;
  #manifest;
  #texts;
  #base;
  #recipe;
  #graph;
  #adapters = new Map(); // name → a promise of { sideInputs, texts, labels }

  constructor(source, manifest, texts, base, recipe, graph, backend) {
    this.#source = source;
    this.#manifest = manifest;
    this.#texts = texts;
    this.#base = base;
    this.#recipe = recipe;
    this.#graph = graph;
    this.backend = backend;
    this.task = manifest.task;
    for (const name of Object.keys(manifest.adapters)) this.#adapters.set(name, null); // read when first used
  }

  get adapters() {
    return [...this.#adapters.keys()];
  }

  get hasChatTemplate() {
    return this.#texts.template !== null;
  }

  async addAdapter(name, place) {
    if (typeof name !== "string" || !name) throw new UsageError("an adapter needs a name");
    if (this.#adapters.has(name)) throw new UsageError(`there is already an adapter ${JSON.stringify(name)}: remove it first`);
    const sideInputs = await readAdapter(place, this.#manifest);
    const directory = directoryOf(place);
    if (directory !== null) {
      await checkSameTexts(directory, this.#texts);
      await this.#checkSameRecipe(openSource(directory), "", name);
    }
    this.#adapters.set(name, Promise.resolve({ sideInputs, texts: this.#texts, labels: this.#labelsOf(sideInputs, null) }));
  }

  removeAdapter(name) {
    if (!this.#adapters.delete(name)) throw this.#unknown(name);
  }

  async generate(options) {
    checkOptions("generate", options, [
      ...["prompt", "prompts", "adapter", "adapters", "maxNewTokens", "temperature", "topK", "topP", "seed", "chat"],
      ...["onToken", "signal"],
    ]);
    checkDecoder(this.#manifest);
    const { maxNewTokens = 32, chat = false, onToken, signal } = options;
    if (!Number.isSafeInteger(maxNewTokens) || maxNewTokens < 1) throw new UsageError(`maxNewTokens is ${maxNewTokens}: give 1 or more`);
    const sampling = readSampling(options);
    const rows = await this.#rows("prompt", options, (prompt, texts) => encode(prompt, texts, chat));
    await generate(this.#graph, this.#manifest, rows, this.#stack, { maxNewTokens, sampling, onToken, signal });
    const answers = rows.map((row) => ({
      text: row.texts.decode(row.ids),
      tokenIds: row.ids,
      finishReason: row.stopped ? "stop" : "length",
      adapter: row.name,
      promptTokens: row.prompt.length,
    }));
    return "prompt" in options ? answers[0] : answers;
  }

  async classify(options) {
    checkOptions("classify", options, ["text", "texts", "adapter", "adapters"]);
    checkClassifier(this.#manifest);
    checkEncoder(this.#manifest);
    const rows = await this.#rows("text", options, (text, texts) => encode(text, texts, false));
    const logits = await classify(this.#graph, this.#manifest, rows, this.#stack);
    const answers = rows.map((row, number) => ({ logits: logits[number], adapter: row.name }));
    return "text" in options ? answers[0] : answers;
  }

  async classifyTokens(options) {
    checkOptions("classifyTokens", options, ["text", "texts", "adapter", "adapters"]);
    checkTokenClassifier(this.#manifest);
    checkEncoder(this.#manifest);
    const rows = await this.#rows("text", options, (text, texts) => idsOf(wordsOf(texts, string(text))));
    const given = "text" in options ? [options.text] : options.texts;
    rows.forEach((row, number) => Object.assign(row, { parts: wordsOf(row.texts, given[number]) }));
    const tokens = await classifyTokens(this.#graph, this.#manifest, rows, this.#stack);
    const answers = rows.map((row, number) => ({ tokens: tokens[number], labels: row.labels, adapter: row.name }));
    return "text" in options ? answers[0] : answers;
  }

  async embed(options) {
    checkOptions("embed", options, ["text", "texts", "adapter", "adapters", "promptName"]);
    checkEmbedder(this.#manifest);
    checkEncoder(this.#manifest);
    const recipe = this.#recipe;
    const prompt = promptOf(recipe, options.promptName);
    const cut = (text, texts) => wordsOf(texts, text, Math.min(recipe.maxLength, texts.maxLength));
    const rows = await this.#rows("text", options, (text, texts) => idsOf(cut(prompt + string(text), texts)));
    for (const row of rows) {
      const { before, own } = prompt && !recipe.includePrompt ? cut(prompt, row.texts) : { before: [], own: [] };
      row.skipped = own.length && before.length + own.length;
    }
    const vectors = await embed(this.#graph, this.#manifest, rows, this.#stack, recipe);
    const answers = rows.map((row, number) => ({ embedding: vectors[number], adapter: row.name }));
    return "text" in options ? answers[0] : answers;
  }

  async release() {
    await this.#graph.release();
  }

  #stack = (rows) => stack(rows.map(({ adapter }) => adapter), this.#base, this.#manifest, this.#graph.leastRank);

  /** The inputs, given as `one` or as a list, each with its adapter: { prompt, texts, adapter, labels, name }. */
  async #rows(one, options, encoded) {
    const many = `${one}s`;
    if (one in options === many in options) throw new UsageError(`give either ${one} or ${many}`);
    if ("adapter" in options && "adapters" in options) throw new UsageError("give either adapter or adapters");
    const given = one in options ? [options[one]] : options[many];
    if (!Array.isArray(given) || !given.length) throw new UsageError(`${many} is not a list, or is empty`);
    const names = options.adapters ?? Array(given.length).fill(options.adapter ?? null);
    if (!Array.isArray(names) || names.length !== given.length) {
      throw new UsageError(`${names.length} adapters for ${given.length} ${many}: give one for each, null for the base`);
    }
    const rows = [];
    const blends = new Map(); // rows of one blend share it
    for (const [number, name] of names.entries()) {
      const { sideInputs, texts, labels } = await this.#named(name, blends);
      const prompt = encoded(given[number], texts);
      const what = `${one} ${number + 1}`;
      if (!prompt.length) throw new UsageError(`${what} is empty`);
      // An encoder's text may fill all positions; a generated text needs at least one more.
      const room = this.task === "causal-lm" ? texts.maxLength - 1 : texts.maxLength;
      if (prompt.length > room) throw new UsageError(`${what} has ${prompt.length} tokens, the model takes ${room}: shorten it`);
      const vocabulary = this.#tokensOf(sideInputs, texts);
      const outside = prompt.find((token) => !(Number.isSafeInteger(token) && token >= 0 && token < vocabulary));
      if (outside !== undefined) throw new UsageError(`${what} has the token ${outside}, the vocabulary ends at ${vocabulary - 1}`);
      rows.push({ prompt, texts, adapter: sideInputs, labels, name });
    }
    return rows;
  }

  /**
   * The vocabulary size of a row: the base's tokens and those that its adapter adds. Their logits have the offset
   * 0; the tokens of other adapters come after them, and their offsets hide them.
   */
  #tokensOf(sideInputs, texts) {
    const added = this.#manifest.added_tokens;
    if (!added) return texts.vocabulary;
    const { offset } = this.#manifest.changed.find(({ module }) => module === added.output) ?? {};
    const own = sideInputs?.get(offset)?.data;
    return own ? own.findLastIndex((value) => value === 0) + 1 : added.base;
  }

  /** Like `#adapter`, for the adapter of a row: a name, names with weights, or null for the base. */
  async #named(spec, blends) {
    if (spec === null || spec === undefined || typeof spec === "string") return this.#adapter(spec);
    const members = membersOf(spec);
    const found = await Promise.all(members.map(([name]) => this.#adapter(name)));
    if (members.length === 1 && members[0][1] === 1) return found[0];
    if (found.some(({ texts }) => texts !== found[0].texts)) {
      const names = members.map(([name]) => name).join(" and ");
      throw new UsageError(`${names} have different tokenizers, chat templates or settings, so they cannot be blended`);
    }
    const key = JSON.stringify(members);
    if (!blends.has(key)) blends.set(key, blend(found.map(({ sideInputs }, index) => [sideInputs, members[index][1]]), this.#manifest));
    return { sideInputs: blends.get(key), texts: found[0].texts, labels: this.#labelsOf(blends.get(key), null) };
  }

  /**
   * The label names with an adapter: the base's; if the adapter has a head, those of its `entry` in the manifest,
   * or null without an entry.
   */
  #labelsOf(sideInputs, entry) {
    const head = this.#manifest.saved.some(({ input }) => sideInputs.has(input));
    return head ? (entry && (entry.labels ?? this.#texts.labels)) : this.#texts.labels;
  }

  /** Throw AdapterError if the adapter in `folder` of `source` has another pooling recipe than the base. */
  async #checkSameRecipe(source, folder, name) {
    const own = this.#recipe === null ? null : await readRecipe(source, folder, true);
    if (own !== null && JSON.stringify(own) !== JSON.stringify(this.#recipe)) {
      throw new AdapterError(`the adapter ${JSON.stringify(name)} has another pooling recipe than the base (modules.json): use Python`);
    }
  }

  /** The side inputs, the texts and the labels of an adapter by name, or of the base for null. */
  async #adapter(name) {
    if (name === null || name === undefined) return { sideInputs: null, texts: this.#texts, labels: this.#texts.labels };
    if (!this.#adapters.has(name)) throw this.#unknown(name);
    if (this.#adapters.get(name) === null) {
      const reading = this.#readOwn(name);
      this.#adapters.set(name, reading);
      // A failure, such as of a fetch, is not cached: the next use tries again.
      reading.catch(() => this.#adapters.get(name) === reading && this.#adapters.set(name, null));
    }
    return this.#adapters.get(name);
  }

  async #readOwn(name) {
    const sideInputs = await readOwnAdapter(this.#source, name, this.#manifest);
    const texts = await readOwnTexts(this.#source, name, this.#manifest, this.#texts);
    const folder = this.#manifest.adapters[name]?.path;
    if (folder) await this.#checkSameRecipe(this.#source, `${folder}/`, name);
    return { sideInputs, texts, labels: this.#labelsOf(sideInputs, this.#manifest.adapters[name] ?? null) };
  }

  #unknown(name) {
    const known = this.adapters.map((one) => JSON.stringify(one)).join(", ") || "none";
    return new AdapterError(`no adapter is loaded as ${JSON.stringify(name)}; there are: ${known}`);
  }
}

function string(text) {
  if (typeof text !== "string") throw new UsageError("a text is not a string");
  return text;
}

function encode(prompt, texts, chat) {
  if (typeof prompt === "string") {
    if (prompt === "") return [];
    return chat ? texts.encodeChat([{ role: "user", content: prompt }]) : texts.encode(prompt);
  }
  if (!Array.isArray(prompt)) throw new UsageError("a prompt is not a text: give a string, a list of messages, or a list of token ids");
  return prompt.every((token) => typeof token === "number") ? prompt : texts.encodeChat(prompt);
}
