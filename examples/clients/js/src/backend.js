// onnxruntime's packages for JavaScript: which one runs a bundle, and how it is opened.
import { BundleError, UsageError } from "./errors.js";

// `leastRank`: WebGPU's MatMul takes no factors of rank 0. `onDevice`: the KV cache stays there.
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

/** Throw BundleError where this browser's GPU cannot run the bundle. */
async function checkGpu({ precision }) {
  const gpu = await globalThis.navigator?.gpu?.requestAdapter();
  if (!gpu) throw new BundleError("there is no WebGPU here: use the backend wasm");
  if (precision === "fp16" && !gpu.features.has("shader-f16")) {
    throw new BundleError("the bundle is fp16, which this GPU does not compute (shader-f16): use the backend wasm, or a bundle in fp32");
  }
}

/**
 * The bundle's graph, opened: `run(feeds, outputs)` takes { type, data, dims } or tensors by name, and
 * `tensors(feeds)` makes tensors of what is fed more than once.
 * Runs are made one after the other, since onnxruntime-web's sessions take one at a time.
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
  await backend.check?.(manifest);
  const { model, externalData } = await source.graph(manifest.graph, "model.onnx.data", BundleError);
  const options = { executionProviders: [backend.provider], logSeverityLevel: 3 };
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
  // A side input that the session does not list would be dropped, and every adapter be the base.
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
