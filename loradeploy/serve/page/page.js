// A prompt to one model, or to two side by side, as its answers stream in.

const NOBODY = "";
const element = (id) => document.getElementById(id);
const [form, prompt, status] = ["form", "prompt", "status"].map(element);
const columns = [0, 1].map((n) => ({ model: element(`model-${n}`), answers: element(`answers-${n}`), messages: [] }));
let running = null; // the AbortController of what is being answered

/** The answer of the service, or an Error with its message. */
async function ask(path, options) {
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Error(body?.error?.message ?? `${answer.status} ${answer.statusText}`);
}

/** The data of each server-sent event, as JSON. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function add(column, kind, text) {
  const made = document.createElement(kind === "figures" ? "small" : "p");
  made.className = kind;
  made.textContent = text;
  column.answers.append(made);
  made.scrollIntoView({ block: "nearest" });
  return made;
}

async function answer(column, text, signal) {
  const chat = element("chat").checked;
  add(column, "user", text);
  const shown = add(column, "assistant", "");
  const asked = [...column.messages, { role: "user", content: text }];
  const body = {
    model: column.model.value,
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number(element("temperature").value),
    max_tokens: Number(element("tokens").value),
    ...(chat ? { messages: asked } : { prompt: text }),
  };
  const begin = performance.now();
  try {
    const path = chat ? "v1/chat/completions" : "v1/completions";
    const headers = { "Content-Type": "application/json" };
    const found = await ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
    for await (const event of events(found.body)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      if (choice) {
        shown.textContent += (chat ? choice.delta.content : choice.text) ?? "";
        shown.scrollIntoView({ block: "nearest" });
      }
      if (event.usage) {
        const seconds = (performance.now() - begin) / 1000;
        add(column, "figures", `${event.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s`);
      }
    }
    if (!shown.textContent) shown.textContent = "(an empty answer)";
    else if (chat) column.messages = [...asked, { role: "assistant", content: shown.textContent }];
  } catch (problem) {
    if (problem.name === "AbortError") add(column, "figures", "stopped");
    else add(column, "wrong", problem.message);
    if (!shown.textContent) shown.remove();
  }
}

function busy(controller) {
  running = controller;
  element("send").disabled = controller !== null;
  element("stop").disabled = controller === null;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = prompt.value;
  if (running || element("send").disabled || !text.trim()) return;
  prompt.value = "";
  const controller = new AbortController();
  busy(controller);
  const asked = columns.filter((column) => column.model.value !== NOBODY);
  await Promise.all(asked.map((column) => answer(column, text, controller.signal)));
  busy(null);
  prompt.focus();
});

prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});

element("stop").addEventListener("click", () => running?.abort());
element("clear").addEventListener("click", () => {
  running?.abort();
  for (const column of columns) {
    column.messages = [];
    column.answers.replaceChildren();
  }
  prompt.focus();
});
for (const column of columns) {
  column.model.addEventListener("change", () => {
    column.messages = []; // another model has not given these answers
    column.answers.replaceChildren();
  });
}

try {
  const { data } = await (await ask("v1/models")).json();
  const names = data.map((model) => model.id);
  for (const [n, column] of columns.entries()) {
    if (n === 1) column.model.add(new Option("nothing", NOBODY));
    for (const model of data) column.model.add(new Option(model.parent ? model.id : `${model.id} (base)`, model.id));
  }
  columns[0].model.value = names[1] ?? names[0];
  columns[1].model.value = names[2] ?? (names.length > 1 ? names[0] : NOBODY);
  const adapters = data.filter((model) => model.parent).length;
  status.textContent = `${data[0]?.root ?? "no model"}, ${adapters} adapter${adapters === 1 ? "" : "s"}`;
  element("send").disabled = !data.length;
} catch (problem) {
  status.textContent = `The models could not be loaded: ${problem.message}`;
}
