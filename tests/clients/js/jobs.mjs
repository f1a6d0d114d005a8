// What a test asks of the client, and what came of it, as JSON; the same in Node and in a browser.
//
// A job: { bundle, backend, add: { name: place }, calls: [[method, options], …] }, where addAdapter and
// removeAdapter are given a list. Its result: for
// each call { value } or { error, message }, with the pieces that were streamed; `load` and `add`
// that fail are told in place of it.

export async function runJobs(load, jobs) {
  const results = [];
  for (const job of jobs) results.push(await told(() => runJob(load, job)));
  return results;
}

async function runJob(load, { bundle, backend, add = {}, calls = [] }) {
  const files = new Set();
  const model = await load(bundle, { backend, onProgress: ({ file }) => files.add(file) });
  const added = {};
  for (const [name, place] of Object.entries(add)) added[name] = await told(() => model.addAdapter(name, place));
  const answers = [];
  for (const [method, options] of calls) {
    const pieces = {};
    const onToken = (text, row) => (pieces[row] = (pieces[row] ?? "") + text);
    const given = method === "generate" ? { ...options, onToken } : options;
    const values = Array.isArray(options) ? options : [given];
    answers.push({ ...(await told(() => model[method](...values))), pieces });
  }
  await model.release();
  return { adapters: model.adapters, added, answers, files: [...files] };
}

async function told(run) {
  try {
    // Logits are a Float32Array, which JSON writes as an object.
    return { value: JSON.parse(JSON.stringify((await run()) ?? null, plain)) };
  } catch (problem) {
    return { error: problem?.name ?? "none", message: String(problem?.message ?? problem) };
  }
}

function plain(key, value) {
  return value instanceof Float32Array ? Array.from(value) : value;
}
