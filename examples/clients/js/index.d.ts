/** Where a bundle or an adapter is: a directory or file in Node, a URL anywhere. */
export type Place = string | URL;

export interface LoadOptions {
  /**
   * "node" (onnxruntime-node), "wasm" or "webgpu" (onnxruntime-web). By default "node" in Node and
   * "wasm" in a browser.
   */
  backend?: "node" | "wasm" | "webgpu";
  /** Called while a file is fetched from a URL; `total` is NaN where the server does not say. */
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
 * The name of an adapter, or a blend of several, { name: weight }: the sum of their updates, each times its
 * weight. null is the base model.
 */
export type AdapterSpec = string | { [name: string]: number } | null;

export interface GenerateSettings {
  /** 32 by default; a text ends earlier at the model's last position. */
  maxNewTokens?: number;
  /** 0, the default, takes the likeliest token each time. */
  temperature?: number;
  /** Sample from so many of the likeliest tokens; 0 is all. By default that of generation_config.json. */
  topK?: number;
  /** Sample from the likeliest tokens up to this probability. By default that of generation_config.json. */
  topP?: number;
  /** The same seed gives the same text, in any batch. Not that of Python's generator. */
  seed?: number;
  /** Take a text for a user's message, and apply the chat template. */
  chat?: boolean;
  /** Called with each piece of text once it is complete, and the number of its prompt. */
  onToken?: (text: string, row: number) => void;
  /** Stops the generation: the promise is rejected with the signal's reason. */
  signal?: AbortSignal;
}

export interface Answer {
  text: string;
  /** Without the token that ended the text. */
  tokenIds: number[];
  /** "stop" where a token ended the text, "length" at `maxNewTokens` or the model's last position. */
  finishReason: "stop" | "length";
  adapter: AdapterSpec;
  promptTokens: number;
}

export interface Classification {
  /** Of each label. */
  logits: Float32Array;
  adapter: AdapterSpec;
}

export interface Token {
  id: number;
  /** As the vocabulary has it. */
  token: string;
  /** Of each label. */
  logits: Float32Array;
  /** The likeliest label; null where nothing names the outputs. */
  label: string | null;
  /** Its probability. */
  score: number;
}

export interface TokenClassification {
  /** The tokens of the text, without special ones. */
  tokens: Token[];
  /**
   * The names of the outputs, in their order: those of the adapter, where it came with the bundle and brings a
   * head, else the base's. null of an adapter with a head that was added.
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

/** A bundle that is open. */
export interface Model {
  readonly task: string;
  readonly backend: "node" | "wasm" | "webgpu";
  /** The names of the adapters: those that came with the bundle, which are read when first used, and others. */
  readonly adapters: string[];
  readonly hasChatTemplate: boolean;

  /**
   * Add an adapter: an .onnx_adapter file, a PEFT directory, or its .safetensors file with
   * adapter_config.json beside it.
   *
   * @throws AdapterError - it cannot be read, or does not fit the bundle; every misfit is named.
   */
  addAdapter(name: string, place: Place): Promise<void>;
  removeAdapter(name: string): void;

  /** Continue a prompt, or several in one batch, each with its own adapter. */
  generate(options: GenerateSettings & { prompt: Prompt; adapter?: AdapterSpec }): Promise<Answer>;
  generate(
    options: GenerateSettings & { prompts: Prompt[]; adapters?: AdapterSpec[]; adapter?: AdapterSpec },
  ): Promise<Answer[]>;

  /** The logits of a text, or of several in one batch, by a sequence classifier. */
  classify(options: { text: string; adapter?: AdapterSpec }): Promise<Classification>;
  classify(options: { texts: string[]; adapters?: AdapterSpec[]; adapter?: AdapterSpec }): Promise<Classification[]>;

  /** What each token of a text is, or of several in one batch, by a token classifier. */
  classifyTokens(options: { text: string; adapter?: AdapterSpec }): Promise<TokenClassification>;
  classifyTokens(options: TextsSettings): Promise<TokenClassification[]>;

  /**
   * The vector of a text, or of several in one batch: pooled as modules.json beside the base has it, else the
   * mean of its tokens' states, of length 1. Longer texts than the model takes are cut at their end.
   * `promptName`: the prompt that is put before each text.
   */
  embed(options: { text: string; adapter?: AdapterSpec; promptName?: string }): Promise<Embedding>;
  embed(options: TextsSettings & { promptName?: string }): Promise<Embedding[]>;

  /** Free the memory of the model. */
  release(): Promise<void>;
}

/**
 * Open the bundle at `source`, as `loradeploy export --required-inputs` writes it.
 *
 * @throws BundleError - it is broken, or this backend cannot run it.
 */
export function load(source: Place, options?: LoadOptions): Promise<Model>;

/** An error that this package throws on purpose; its message is one line. */
export class LoraDeployError extends Error {}
/** Options that do not go together, or a value out of its range. */
export class UsageError extends LoraDeployError {}
/** A bundle that is broken, or that the backend cannot run. */
export class BundleError extends LoraDeployError {}
/** An adapter that cannot be read, or does not fit the bundle. */
export class AdapterError extends LoraDeployError {}
