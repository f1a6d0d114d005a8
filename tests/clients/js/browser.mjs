// Runs jobs in Chromium, and operates the example's page like a user.
//
//     node browser.mjs EXAMPLES BUNDLE SCREENSHOTS < JOBS
//
// EXAMPLES has web/ and clients/js/ with its node_modules. Bundles of jobs are URLs below the page.
// Writes a PNG for each view, and prints { and, jobs, page, views } as JSON.
import { spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [examples, bundle, screenshots] = process.argv.slice(2);
const { chromium } = createRequire(join(examples, "clients", "js", "package.json"))("playwright-core");
const FLAGS = [
  ...["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"],
  ...["--disable-component-update", "--disable-sync"],
  // WebGPU on SwiftShader, a software GPU.
  ...["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"],
  ...["--use-vulkan=swiftshader", "--disable-vulkan-surface"],
  "--js-flags=--liftoff-only", // optimizing 40 MB of WebAssembly takes longer than tiny models
];
const PATIENCE = 300_000; // ms: machines may be busy
const VIEWS = [
  { name: "phone-light", width: 390, height: 844, colorScheme: "light" },
  { name: "desktop-dark", width: 1200, height: 800, colorScheme: "dark" },
];

const jobs = JSON.parse(readFileSync(0, "utf8"));
const server = spawn(process.execPath, [join(examples, "web", "serve.mjs"), bundle, "0"]);
const url = await new Promise((resolve) => server.stdout.on("data", (line) => resolve(String(line).trim())));
const profile = mkdtempSync(join(tmpdir(), "chromium-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: "/usr/bin/chromium",
  headless: true,
  args: FLAGS,
  timeout: PATIENCE,
});
context.setDefaultTimeout(PATIENCE);
try {
  const result = { ...(await runInPage()), ...(await useThePage()) };
  console.log(JSON.stringify(result));
} finally {
  await context.close();
  server.kill();
  rmSync(profile, { recursive: true, force: true });
}

/** The jobs, in an empty page with the example's import map, behind the product of bools in and.onnx. */
async function runInPage() {
  const [map] = /<script type="importmap">.*?<\/script>/s.exec(readFileSync(join(examples, "web", "index.html"), "utf8"));
  const modules = readFileSync(new URL("jobs.mjs", import.meta.url), "utf8");
  const page = await context.newPage();
  const serve = (path, contentType, body) => page.route(url + path, (route) => route.fulfill({ contentType, body }));
  await serve("jobs.html", "text/html", `<!doctype html>${map}`);
  await serve("jobs.mjs", "text/javascript", modules);
  await page.goto(`${url}jobs.html`);
  const and = await page.evaluate(breakAnd);
  const results = await page.evaluate(async (jobs) => {
    const { load } = await import("loradeploy-client");
    const { runJobs } = await import("/jobs.mjs");
    return runJobs(load, jobs);
  }, jobs);
  await page.close();
  return { and, jobs: results };
}

/**
 * How many values WebGPU's And gets wrong: a row with a column, and then matrices, as in the masks of
 * batches, for which the page takes the same kernel. The session stays open: with the last one the kernels go.
 */
async function breakAnd() {
  const ort = await import("onnxruntime-web/webgpu");
  const session = await ort.InferenceSession.create("/bundle/and.onnx", { executionProviders: ["webgpu"], logSeverityLevel: 3 });
  const bools = (dims, step) => {
    const size = dims.reduce((product, side) => product * side);
    return new ort.Tensor("bool", Uint8Array.from({ length: size }, (_, index) => index % step > 0), dims);
  };
  await session.run({ x: bools([2, 1, 1, 12], 3), y: bools([1, 1, 12, 1], 5) });
  const [x, y] = [bools([1, 1, 12, 12], 3), bools([2, 1, 12, 12], 5)];
  const [once, twice] = [x.data.slice(), y.data.slice()];
  const { z } = await session.run({ x, y });
  return z.data.filter((value, index) => value !== (once[index % once.length] & twice[index])).length;
}

/** What the example's page shows, by keyboard alone, and what it says of a bundle that is missing. */
async function useThePage() {
  const page = await context.newPage();
  const problems = [];
  page.on("pageerror", (problem) => problems.push(problem.message));
  const shown = (id) => page.locator(`#${id}`).innerText();
  const focused = () => page.evaluate(() => document.activeElement.id);

  await page.setViewportSize(VIEWS[0]);
  await page.goto(url);
  await page.waitForFunction(() => document.getElementById("status").textContent.startsWith("Ready"));
  const seen = { ready: await shown("status"), focused: await focused(), options: await page.locator("option").allInnerTexts() };
  // Watch the answer grow.
  await page.evaluate(() => {
    window.lengths = [];
    const answer = document.getElementById("answer");
    new MutationObserver(() => window.lengths.push(answer.textContent.length)).observe(answer, { childList: true, characterData: true, subtree: true });
  });
  await page.locator("#tokens").fill("12");
  await page.locator("#prompt").focus();
  // From the prompt, which has the focus: type the text, then go back to the selection.
  await page.keyboard.type("Shares rose");
  await page.keyboard.press("Shift+Tab");
  const picker = await focused();
  const answers = {};
  for (const key of [null, "ArrowDown", "ArrowDown"]) {
    if (key) await page.keyboard.press(key);
    const adapter = await page.locator("#adapter").inputValue();
    await page.keyboard.press("Tab");
    await page.keyboard.press("Control+Enter");
    await page.waitForFunction(() => document.getElementById("figures").textContent !== "" && document.getElementById("stop").disabled);
    answers[adapter] = await shown("answer");
    await page.keyboard.press("Shift+Tab");
  }
  const figures = await shown("figures");
  const steps = await page.evaluate(() => window.lengths.filter((length) => length > 0).length);

  const views = {};
  for (const { name, width, height, colorScheme } of VIEWS) {
    await page.emulateMedia({ colorScheme });
    await page.setViewportSize({ width, height });
    await page.screenshot({ path: join(screenshots, `${name}.png`), fullPage: true });
    views[name] = await page.evaluate(() => ({
      overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      background: getComputedStyle(document.body).backgroundColor,
      columns: getComputedStyle(document.querySelector("main")).gridTemplateColumns.split(" ").length,
    }));
  }

  // A prompt that is too long, then a bundle that does not exist.
  await page.locator("#prompt").fill("word ".repeat(200));
  await page.locator("#prompt").press("Control+Enter");
  await page.waitForFunction(() => !document.getElementById("error").hidden);
  const tooLong = { error: await shown("error"), enabled: await page.locator("#generate").isEnabled() };
  await page.goto(`${url}?bundle=/nothing/`);
  await page.waitForFunction(() => !document.getElementById("error").hidden);
  await page.setViewportSize(VIEWS[0]);
  await page.screenshot({ path: join(screenshots, "missing.png"), fullPage: true });
  const missing = { status: await shown("status"), error: await shown("error"), enabled: await page.locator("#generate").isEnabled() };
  // Then without the client's packages, as if they were not installed.
  await page.route("**/@huggingface/jinja/**", (route) => route.fulfill({ status: 404 }));
  await page.goto(url);
  await page.waitForFunction(() => !document.getElementById("error").hidden);
  const noPackages = { status: await shown("status"), error: await shown("error"), progress: await page.locator("#progress").isVisible() };
  return { page: { ...seen, picker, answers, figures, steps, tooLong, missing, noPackages, problems }, views };
}
