// Reads the files of a bundle or an adapter: from a directory in Node, below a URL anywhere.
import { LoraDeployError } from "./errors.js";

const MiB = 2 ** 20;
/** The maximum size in bytes of each kind of file. */
export const LIMITS = { json: 64 * MiB, tokenizer: 512 * MiB, adapter: 2048 * MiB, graph: 4095 * MiB };

export const IN_NODE = typeof process !== "undefined" && Boolean(process.versions?.node);

/** Whether `text` is a URL; in a browser, every text is. */
function isUrl(text) {
  return !IN_NODE || /^(https?|blob|data):/i.test(text);
}

/**
 * Return a reader of the files in `place`, a directory or a URL.
 *
 * `onProgress({ file, loaded, total })` is called while a file is fetched; `total` is NaN if unknown.
 */
export function openSource(place, onProgress) {
  const text = String(place);
  if (text.startsWith("file:") || !isUrl(text)) return new Directory(text);
  return new Remote(text, onProgress);
}

class Source {
  constructor(place) {
    this.place = place;
  }

  /** The file's bytes; throws a `Problem` if it is missing or larger than `limit`. */
  async bytes(name, limit, Problem = LoraDeployError) {
    const found = await this.find(name, limit, Problem);
    if (found === null) throw new Problem(`${this.where(name)} does not exist`);
    return found;
  }

  async text(name, limit, Problem) {
    return decoded(await this.bytes(name, limit, Problem), this.where(name), Problem);
  }

  async json(name, Problem) {
    return parsed(await this.text(name, LIMITS.json, Problem), this.where(name), Problem);
  }

  /** Like `text`, or null if there is no such file. */
  async optionalText(name, limit, Problem) {
    const found = await this.find(name, limit, Problem);
    return found === null ? null : decoded(found, this.where(name), Problem);
  }

  /** Like `json`, or {} if there is no such file. */
  async optionalJson(name, Problem) {
    const text = await this.optionalText(name, LIMITS.json, Problem);
    return text === null ? {} : parsed(text, this.where(name), Problem);
  }
}

class Directory extends Source {
  where(name) {
    return `${this.place}/${name}`;
  }

  async path(name) {
    const { fileURLToPath } = await import("node:url");
    const { join } = await import("node:path");
    return join(this.place.startsWith("file:") ? fileURLToPath(this.place) : this.place, name);
  }

  async find(name, limit, Problem) {
    const { open } = await import("node:fs/promises");
    let file;
    try {
      file = await open(await this.path(name), "r");
      const status = await file.stat();
      if (!status.isFile()) throw new Problem(`${this.where(name)} is not a regular file`);
      if (status.size > limit) throw tooLarge(this.where(name), status.size, limit, Problem);
      return new Uint8Array(await file.readFile());
    } catch (problem) {
      if (problem.code === "ENOENT" || problem.code === "ENOTDIR") return null;
      if (problem instanceof LoraDeployError) throw problem;
      throw new Problem(`${this.where(name)} cannot be read: ${problem.message}`);
    } finally {
      await file?.close();
    }
  }

  /** The arguments by which onnxruntime opens a graph; it finds the weights in the same directory. */
  async graph(name) {
    return { model: await this.path(name), externalData: undefined };
  }
}

class Remote extends Source {
  constructor(place, onProgress) {
    super(place);
    const here = typeof location === "undefined" ? undefined : location.href;
    this.base = new URL(place.endsWith("/") ? place : `${place}/`, here);
    this.onProgress = onProgress;
  }

  where(name) {
    return new URL(name, this.base).href;
  }

  async find(name, limit, Problem) {
    const url = this.where(name);
    let response;
    try {
      response = await fetch(url);
    } catch (problem) {
      throw new Problem(`${url} cannot be fetched: ${problem.message}`);
    }
    if (response.status === 404) return null;
    if (!response.ok) throw new Problem(`${url} cannot be fetched: HTTP status ${response.status}`);
    // The content length of a compressed response is not that of the file.
    const length = response.headers.get("content-encoding") ? null : response.headers.get("content-length");
    const total = length === null ? NaN : Number(length);
    if (total > limit) throw tooLarge(url, total, limit, Problem);
    const parts = [];
    let loaded = 0;
    try {
      for (const reader = response.body.getReader(); ; ) {
        const { done, value } = await reader.read();
        if (done) break;
        parts.push(value);
        loaded += value.length;
        if (loaded > limit) throw tooLarge(url, loaded, limit, Problem);
        this.onProgress?.({ file: name, loaded, total });
      }
    } catch (problem) {
      if (problem instanceof LoraDeployError) throw problem;
      throw new Problem(`${url} cannot be fetched: ${problem.message}`);
    }
    if (loaded < total) throw new Problem(`${url} ended after ${loaded} of ${total} bytes`);
    const whole = new Uint8Array(loaded);
    let offset = 0;
    for (const part of parts) {
      whole.set(part, offset);
      offset += part.length;
    }
    return whole;
  }

  async graph(name, data, Problem) {
    const model = await this.bytes(name, LIMITS.graph, Problem);
    const weights = await this.bytes(data, LIMITS.graph, Problem);
    return { model, externalData: [{ path: data, data: weights }] };
  }
}

function tooLarge(where, size, limit, Problem) {
  return new Problem(`${where} has ${size} bytes, more than the ${limit} that are read`);
}

function decoded(bytes, where, Problem) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Problem(`${where} is not UTF-8`);
  }
}

/** The JSON object in `text`. */
export function parsed(text, where, Problem) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (problem) {
    throw new Problem(`${where} is not JSON: ${problem.message}`);
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    throw new Problem(`${where} is not a JSON object`);
  }
  return value;
}
