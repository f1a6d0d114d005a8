// Finds nodes by operator in an ONNX file (protobuf).
import { BundleError } from "./errors.js";

// Fields of ModelProto, GraphProto, NodeProto and AttributeProto.
const GRAPH = 7;
const NODE = 1;
const [NODE_NAME, OPERATOR, ATTRIBUTE] = [3, 4, 5];
const ATTRIBUTE_GRAPHS = [6, 11];
// The wire types of protobuf.
const [VARINT, BYTES] = [0, 2];
const FIXED_SIZES = { 1: 8, 5: 4 };

/**
 * The names of the nodes with one of `operators` in the ONNX model `bytes`, including those in subgraphs.
 * Throws BundleError if it is not an ONNX model, or one of the nodes has no name.
 */
export function nodeNames(bytes, operators) {
  const found = [];
  const inGraph = (graph) => {
    for (const node of bytesOf(graph, NODE)) {
      if (operators.includes(text(node, OPERATOR))) found.push(text(node, NODE_NAME));
      for (const attribute of bytesOf(node, ATTRIBUTE)) ATTRIBUTE_GRAPHS.flatMap((field) => bytesOf(attribute, field)).forEach(inGraph);
    }
  };
  bytesOf(bytes, GRAPH).forEach(inGraph);
  if (found.includes("")) {
    throw new BundleError(
      `a node of ${operators.join(" or ")} in the graph has no name, which is needed to keep it off the GPU:` +
        " export the bundle again, or use the backend wasm",
    );
  }
  return found;
}

/** The contents of the length-delimited fields with this number in a protobuf message. */
function bytesOf(message, number) {
  const found = [];
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let factor = 1; ; factor *= 128) {
      const byte = message[at++];
      if (byte === undefined || factor > 2 ** 63) throw broken();
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
  };
  while (at < message.length) {
    const key = varint();
    const kind = key % 8;
    if (kind === VARINT) {
      varint();
      continue;
    }
    const size = kind === BYTES ? varint() : FIXED_SIZES[kind];
    if (size === undefined || at + size > message.length) throw broken();
    if (kind === BYTES && Math.floor(key / 8) === number) found.push(message.subarray(at, at + size));
    at += size;
  }
  return found;
}

/** The last value of a text field, which is the valid one; "" if there is none. */
function text(message, number) {
  return new TextDecoder().decode(bytesOf(message, number).at(-1) ?? new Uint8Array());
}

function broken() {
  return new BundleError("the graph is not an ONNX model: export the bundle again");
}
