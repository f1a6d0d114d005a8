// The backends: onnxruntime's packages for JavaScript, and how each opens a bundle.
import { BundleError, UsageError } from "./errors.js";
import { nodeNames } from "./onnx.js";
import { LIMITS } from "./source.js";

// `leastRank`: 1 for WebGPU, whose MatMul does not support rank 0. `onDevice`: the KV cache stays on the device.
// `check`: throws if the backend cannot run the bundle, and returns the operators that must run on the CPU.
const BACKENDS = {
  node: { import: () => import("onnxruntime-node"), package: "onnxruntime-node", provider: "cpu", leastRank: 0 },
  wasm: { import: () => import("onnxruntime-web/wasm"), package: "onnxruntime-web", provider: "wasm", leastRank: 0 },
  webgpu: {
    import: () => import("onnxruntime-web/webgpu"),
    package: "onnxruntime-web",
    provider: "webgpu",
    leastRank: 1,
    onDevice: true,
    check: checkGpu,
  },
};

// Kernels of onnxruntime-web 1.30 with wrong results. After an And of a row and a column, in any open session
// of the page, And is wrong for other shapes, such as the masks of batches.
const WRONG = ["And", "Or", "Xor"];
// Wrong from 32 tokens on, on SwiftShader, a software GPU; not known on hardware GPUs.
const WRONG_ON_SWIFTSHADER = ["GroupQueryAttention"];

/** Throw BundleError if this browser's GPU cannot run the bundle; return the operators with wrong kernels. */
async function checkGpu({ precision }) {
  const gpu = await globalThis.navigator?.gpu?.requestAdapter();
  if (!gpu) throw new BundleError("there is no WebGPU here: use the backend wasm");
  if (precision === "fp16" && !gpu.features.has("shader-f16")) {
    throw new BundleError("the bundle is fp16, which this GPU does not compute (shader-f16): use the backend wasm, or a bundle in fp32");
  }
  return gpu.info?.architecture === "swiftshader" ? [...WRONG, ...WRONG_ON_SWIFTSHADER] : WRONG;
}

/** onnxruntime's option that keeps the nodes of `operators` on the CPU. */
async function keptOnCpu(operators, model, source, graph) {
  const bytes = typeof model === "string" ? await source.bytes(graph, LIMITS.graph, BundleError) : model;
  const names = nodeNames(bytes, operators);
  return names.length ? { forceCpuNodeNames: names } : {}; // onnxruntime refuses an empty list
}

/**
 * Open the bundle's graph. `run(feeds, outputs)` of the result takes { type, data, dims } or tensors by name;
 * `tensors(feeds)` makes tensors of feeds that are used more than once.
 * Runs are serialized, since a session of onnxruntime-web allows only one at a time.
 */
export async function openGraph(source, manifest, name, presents) {
  const backend = Object.hasOwn(BACKENDS, name) ? BACKENDS[name] : null;
  if (!backend) {
    throw new UsageError(`the backend ${JSON.stringify(name)} is none of ${Object.keys(BACKENDS).join(", ")}`);
  }
  const ort = await backend.import().catch((problem) => {
    throw new UsageError(
      `the backend ${name} needs ${backend.package}: npm install --ignore-scripts ${backend.package}` +
        ` (${problem.message})`,
    );
  });
  const onCpu = (await backend.check?.(manifest)) ?? [];
  const { model, externalData } = await source.graph(manifest.graph, "model.onnx.data", BundleError);
  const provider = { name: backend.provider };
  if (onCpu.length) Object.assign(provider, await keptOnCpu(onCpu, model, source, manifest.graph));
  const options = { executionProviders: [provider], logSeverityLevel: 3 };
  if (externalData) options.externalData = externalData;
  if (backend.onDevice) {
    options.preferredOutputLocation = Object.fromEntries(presents.map((output) => [output, "gpu-buffer"]));
  }
  let session;
  try {
    session = await ort.InferenceSession.create(model, options);
  } catch (problem) {
    throw new BundleError(`${source.where(manifest.graph)} cannot be opened by the backend ${name}: ${problem.message ?? problem}`);
  }
  // onnxruntime would drop feeds of side inputs that the session does not list, and every adapter would
  // give the base's results.
  const choices = [...(manifest.layout === "slots" && manifest.targets.length ? ["adapter_ids"] : []), ...(manifest.branches ? ["adapter_mode"] : [])];
  for (const input of [...manifest.sideInputs.keys(), ...choices]) {
    if (!session.inputNames.includes(input)) {
      throw new BundleError(`${source.where(manifest.graph)} does not take ${input}: export the bundle again`);
    }
  }
  const tensor = (value) => (value instanceof ort.Tensor ? value : new ort.Tensor(value.type, value.data, value.dims));
  const tensors = (feeds) => Object.fromEntries(Object.entries(feeds).map(([input, value]) => [input, tensor(value)]));
  let last = Promise.resolve();
  return {
    leastRank: backend.leastRank,
    tensors,
    run(feeds, outputs) {
      const made = tensors(feeds);
      const next = last.then(() => session.run(made, outputs));
      last = next.catch(() => undefined);
      return next;
    },
    release: () => last.then(() => session.release()),
  };
}
