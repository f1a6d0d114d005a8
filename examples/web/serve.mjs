// Serves this page, the client and a bundle to browsers on this machine:
//
//     node examples/web/serve.mjs BUNDLE [PORT]
import { createReadStream, existsSync } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, resolve, sep } from "node:path";
import { fileURLToPath } from "node:url";

const here = fileURLToPath(new URL(".", import.meta.url));
const [bundle, port = "8000"] = process.argv.slice(2);
if (!bundle || !existsSync(join(bundle, "required.onnx")) || !(port >= 0 && port < 65536)) {
  console.error("give a bundle of `loradeploy export --required-inputs`: node serve.mjs BUNDLE [PORT]");
  process.exit(2);
}
// Path prefixes, and the directories that they are served from.
const ROOTS = [
  ["/bundle/", resolve(bundle)],
  ["/client/", resolve(here, "../clients/js")],
  ["/", resolve(here)],
];
const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".css": "text/css; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".mjs": "text/javascript; charset=utf-8",
  ".json": "application/json",
  ".wasm": "application/wasm",
};
const HEADERS = {
  "Cache-Control": "no-cache",
  "X-Content-Type-Options": "nosniff",
  // These two enable SharedArrayBuffer, which onnxruntime needs to use several threads.
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
};

/** The file of a URL's path; null if it is outside of the served directory. */
function fileOf(path) {
  const [prefix, directory] = ROOTS.find(([begin]) => path.startsWith(begin));
  const file = join(directory, path === "/" ? "index.html" : path.slice(prefix.length));
  return file.startsWith(directory + sep) ? file : null;
}

const server = createServer(async (request, response) => {
  const answer = (status, headers = {}) => response.writeHead(status, { ...HEADERS, ...headers });
  try {
    const file = fileOf(decodeURIComponent(new URL(request.url, "http://localhost").pathname));
    const status = file && (await stat(file).catch(() => null));
    if (!status?.isFile()) {
      answer(404).end("not found");
      return;
    }
    const type = TYPES[extname(file)] ?? "application/octet-stream";
    answer(200, { "Content-Type": type, "Content-Length": status.size });
    if (request.method === "HEAD") response.end();
    else createReadStream(file).on("error", () => response.destroy()).pipe(response);
  } catch {
    answer(400).end("bad request");
  }
});
server.on("error", (problem) => {
  console.error(`cannot listen on port ${port}, give another one: ${problem.message}`);
  process.exit(2);
});
server.listen(Number(port), "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}/`));
