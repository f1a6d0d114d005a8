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

/** The name of an adapter; null is the base model. */
export type AdapterName = string | null;

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
  adapter: AdapterName;
  promptTokens: number;
}

export interface Classification {
  /** Of each label. */
  logits: Float32Array;
  adapter: AdapterName;
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
  generate(options: GenerateSettings & { prompt: Prompt; adapter?: AdapterName }): Promise<Answer>;
  generate(
    options: GenerateSettings & { prompts: Prompt[]; adapters?: AdapterName[]; adapter?: AdapterName },
  ): Promise<Answer[]>;

  /** The logits of a text, or of several in one batch, by a sequence classifier. */
  classify(options: { text: string; adapter?: AdapterName }): Promise<Classification>;
  classify(options: { texts: string[]; adapters?: AdapterName[]; adapter?: AdapterName }): Promise<Classification[]>;

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
