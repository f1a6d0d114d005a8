/** The location of a bundle or an adapter: a directory or file in Node, a URL anywhere. */
export type Place = string | URL;

export interface LoadOptions {
  /**
   * "node" (onnxruntime-node), "wasm" or "webgpu" (onnxruntime-web). By default "node" in Node and
   * "wasm" in a browser.
   */
  backend?: "node" | "wasm" | "webgpu";
  /** Called while a file is fetched from a URL; `total` is NaN if the size is unknown. */
  onProgress?: (progress: { file: string; loaded: number; total: number }) => void;
}

export interface Message {
  role: string;
  content: unknown;
  [field: string]: unknown;
}

/** A text, a conversation for the chat template, or token ids. */
export type Prompt = string | Message[] | number[];

/**
 * The name of an adapter, or a blend { name: weight }: the weighted sum of the adapters' updates. null is the
 * base model.
 */
export type AdapterSpec = string | { [name: string]: number } | null;

export interface GenerateSettings {
  /** Maximum number of generated tokens, 32 by default; limited by the model's positions. */
  maxNewTokens?: number;
  /** Sampling temperature; 0, the default, is greedy decoding. */
  temperature?: number;
  /** Sample from this many most likely tokens; 0 is all. Default: the value in generation_config.json. */
  topK?: number;
  /**
   * Sample from the smallest set of most likely tokens with this total probability. Default: the value in
   * generation_config.json.
   */
  topP?: number;
  /** The same seed gives the same text, in any batch, but not the same as in Python. */
  seed?: number;
  /** Apply the chat template: a text is a user message. */
  chat?: boolean;
  /** Called with each piece of text as it is generated, and the index of its prompt. */
  onToken?: (text: string, row: number) => void;
  /** Aborts the generation; the promise is rejected with the signal's reason. */
  signal?: AbortSignal;
}

export interface Answer {
  text: string;
  /** Without the token that ended the text. */
  tokenIds: number[];
  /** "stop" if a token ended the text, "length" at `maxNewTokens` or the model's last position. */
  finishReason: "stop" | "length";
  adapter: AdapterSpec;
  promptTokens: number;
}

export interface Classification {
  /** One for each label. */
  logits: Float32Array;
  adapter: AdapterSpec;
}

export interface Token {
  id: number;
  /** The token as in the vocabulary. */
  token: string;
  /** One for each label. */
  logits: Float32Array;
  /** The most likely label; null if the label names are unknown. */
  label: string | null;
  /** Its probability. */
  score: number;
}

export interface TokenClassification {
  /** The tokens of the text, without special tokens. */
  tokens: Token[];
  /**
   * The label names, in order of the logits: the adapter's, if it is in the bundle and has a head, else the
   * base's. null for an adapter with a head that was added with `addAdapter`.
   */
  labels: string[] | null;
  adapter: AdapterSpec;
}

export interface Embedding {
  embedding: Float32Array;
  adapter: AdapterSpec;
}

interface TextsSettings {
  texts: string[];
  adapters?: AdapterSpec[];
  adapter?: AdapterSpec;
}

/** An open bundle. */
export interface Model {
  readonly task: string;
  readonly backend: "node" | "wasm" | "webgpu";
  /** The names of the adapters: those in the bundle, which are read when first used, and added ones. */
  readonly adapters: string[];
  readonly hasChatTemplate: boolean;

  /**
   * Add an adapter: an .onnx_adapter file, a PEFT directory, or its .safetensors file with an
   * adapter_config.json in the same directory.
   *
   * @throws AdapterError - it cannot be read, or does not fit the bundle; the message lists the problems.
   */
  addAdapter(name: string, place: Place): Promise<void>;
  removeAdapter(name: string): void;

  /** Continue a prompt, or several in one batch, each with its own adapter. */
  generate(options: GenerateSettings & { prompt: Prompt; adapter?: AdapterSpec }): Promise<Answer>;
  generate(
    options: GenerateSettings & { prompts: Prompt[]; adapters?: AdapterSpec[]; adapter?: AdapterSpec },
  ): Promise<Answer[]>;

  /** Classify a text, or several in one batch, with a sequence classifier. */
  classify(options: { text: string; adapter?: AdapterSpec }): Promise<Classification>;
  classify(options: { texts: string[]; adapters?: AdapterSpec[]; adapter?: AdapterSpec }): Promise<Classification[]>;

  /** Classify the tokens of a text, or of several in one batch, with a token classifier. */
  classifyTokens(options: { text: string; adapter?: AdapterSpec }): Promise<TokenClassification>;
  classifyTokens(options: TextsSettings): Promise<TokenClassification[]>;

  /**
   * Embed a text, or several in one batch: pooled as in the bundle's modules.json, by default the normalized mean
   * of the tokens' states. Texts that are too long are truncated at the end.
   * `promptName`: the name of a prompt that is put before each text.
   */
  embed(options: { text: string; adapter?: AdapterSpec; promptName?: string }): Promise<Embedding>;
  embed(options: TextsSettings & { promptName?: string }): Promise<Embedding[]>;

  /** Free the memory of the model. */
  release(): Promise<void>;
}

/**
 * Open the bundle at `source`, written by `loradeploy export --required-inputs`.
 *
 * @throws BundleError - it is invalid, or this backend cannot run it.
 */
export function load(source: Place, options?: LoadOptions): Promise<Model>;

/** The base class of all errors of this package; the message is one line. */
export class LoraDeployError extends Error {}
/** Options that cannot be combined, or a value out of range. */
export class UsageError extends LoraDeployError {}
/** A bundle that is invalid, or that the backend cannot run. */
export class BundleError extends LoraDeployError {}
/** An adapter that cannot be read, or does not fit the bundle. */
export class AdapterError extends LoraDeployError {}
