// The page: loads the bundle, and streams the text generated with the selected adapter.
//
// ?bundle=URL loads another bundle, ?backend=webgpu runs it on the GPU.
const at = (id) => document.getElementById(id);
const parameters = new URLSearchParams(location.search);
let model;
let stopping;

at("form").addEventListener("submit", answer);
at("stop").addEventListener("click", () => stopping?.abort());
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
await open();

async function open() {
  const begin = performance.now();
  try {
    const { load } = await client();
    model = await load(parameters.get("bundle") ?? "bundle/", {
      backend: parameters.get("backend") ?? "wasm",
      onProgress: showProgress,
    });
    if (model.task !== "causal-lm") throw new Error(`this bundle is for ${model.task}, the page needs a language model`);
  } catch (problem) {
    at("status").textContent = "The model could not be loaded.";
    at("progress").hidden = true;
    showError(problem);
    return;
  }
  for (const name of model.adapters) at("adapter").add(new Option(name, name));
  at("chat").disabled = !model.hasChatTemplate;
  at("chat").checked = model.hasChatTemplate;
  at("progress").hidden = true;
  at("status").textContent = `Ready after ${seconds(begin)} s (${model.backend}).`;
  at("fields").disabled = at("generate").disabled = false;
  at("prompt").focus();
}

/** The client's module. It is imported here so that the page can report a missing package. */
async function client() {
  try {
    return await import("loradeploy-client");
  } catch (problem) {
    throw new Error(`The client or one of its packages cannot be loaded. Was npm install run? (${problem.message})`);
  }
}

async function answer(event) {
  event.preventDefault();
  if (!model || stopping) return;
  const name = at("adapter").value;
  stopping = new AbortController();
  busy(true);
  at("error").hidden = true;
  at("answer").textContent = at("figures").textContent = "";
  const begin = performance.now();
  let first;
  try {
    // Let the browser paint before a run blocks the thread.
    await new Promise((resume) => setTimeout(resume));
    const { tokenIds, finishReason } = await model.generate({
      prompt: at("prompt").value,
      adapter: name || null,
      chat: at("chat").checked,
      maxNewTokens: at("tokens").valueAsNumber,
      signal: stopping.signal,
      onToken: (text) => {
        first ??= seconds(begin);
        at("answer").textContent += text;
      },
    });
    const ended = finishReason === "stop" ? "the text is complete" : "the maximum number of tokens was reached";
    at("figures").textContent =
      `${name || "Base model"}: ${tokenIds.length} tokens in ${seconds(begin)} s` +
      `${first ? `, the first text after ${first} s` : ""}; ${ended}.`;
    if (!at("answer").textContent) at("answer").textContent = "(an empty answer)";
  } catch (problem) {
    if (stopping.signal.aborted) at("figures").textContent = `Stopped after ${seconds(begin)} s.`;
    else showError(problem);
  } finally {
    stopping = undefined;
    busy(false);
  }
}

function busy(running) {
  at("generate").disabled = running;
  at("stop").disabled = !running;
  at("answer").setAttribute("aria-busy", running);
  if (running) at("status").textContent = "Generating…";
  else at("status").textContent = `Ready (${model.backend}).`;
}

function showProgress({ file, loaded, total }) {
  const MB = (bytes) => (bytes / 1e6).toFixed(1);
  at("status").textContent = `Loading ${file}: ${MB(loaded)}${total ? ` of ${MB(total)}` : ""} MB`;
  if (total) at("progress").value = loaded / total;
  else at("progress").removeAttribute("value");
}

function showError(problem) {
  at("error").textContent = problem.message ?? String(problem);
  at("error").hidden = false;
  at("error").scrollIntoView({ block: "nearest" });
}

function seconds(begin) {
  return ((performance.now() - begin) / 1000).toFixed(1);
}
