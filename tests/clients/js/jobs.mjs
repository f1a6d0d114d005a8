// Runs jobs of a test in the client, and returns the results as JSON; the same in Node and browsers.
//
// A job: { bundle, backend, add: { name: place }, calls: [[method, options], …] }; the options of
// addAdapter and removeAdapter are a list of arguments. The result has { value } or
// { error, message } for each call, with the streamed pieces, and the same for each entry of `add`.

export async function runJobs(load, jobs) {
  const results = [];
  for (const job of jobs) results.push(await outcome(() => runJob(load, job)));
  return results;
}

async function runJob(load, { bundle, backend, add = {}, calls = [] }) {
  const files = new Set();
  const model = await load(bundle, { backend, onProgress: ({ file }) => files.add(file) });
  const added = {};
  for (const [name, place] of Object.entries(add)) added[name] = await outcome(() => model.addAdapter(name, place));
  const answers = [];
  for (const [method, options] of calls) {
    const pieces = {};
    const onToken = (text, row) => (pieces[row] = (pieces[row] ?? "") + text);
    const given = method === "generate" ? { ...options, onToken } : options;
    const values = Array.isArray(options) ? options : [given];
    answers.push({ ...(await outcome(() => model[method](...values))), pieces });
  }
  await model.release();
  return { adapters: model.adapters, added, answers, files: [...files] };
}

async function outcome(run) {
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
