// Operates the page of `loradeploy serve` like a user.
//
//     node serve_page.mjs EXAMPLES URL SCREENSHOTS
// EXAMPLES has clients/js/ with its node_modules. Prints the observed page states as JSON.
import { mkdtempSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [examples, url, screenshots] = process.argv.slice(2);
const { chromium } = createRequire(join(examples, "clients", "js", "package.json"))("playwright-core");
const VIEWS = [
  { name: "phone", width: 390, height: 844, colorScheme: "light" },
  { name: "desktop", width: 1200, height: 800, colorScheme: "dark" },
];

const profile = mkdtempSync(join(tmpdir(), "chromium-"));
const flags = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const context = await chromium.launchPersistentContext(profile, { executablePath: "/usr/bin/chromium", headless: true, args: flags, timeout: 120_000 });
context.setDefaultTimeout(120_000);
try {
  const page = await context.newPage();
  const problems = [];
  const hosts = new Set();
  page.on("pageerror", (problem) => problems.push(problem.message));
  // The page shows refusals as errors.
  page.on("console", (message) => message.type() === "error" && !message.text().includes("status of 400") && problems.push(message.text()));
  page.on("request", (request) => hosts.add(new URL(request.url()).host));
  await page.goto(url);
  await page.waitForFunction(() => !document.getElementById("send").disabled);
  const seen = { problems, status: await page.locator("#status").innerText(), focused: await page.evaluate(() => document.activeElement.id) };
  seen.models = await page.locator("#model-0 option").allInnerTexts();
  seen.picked = [await page.locator("#model-0").inputValue(), await page.locator("#model-1").inputValue()];

  // Watch the answers grow.
  await page.evaluate(() => {
    window.lengths = [];
    const look = () => window.lengths.push([0, 1].map((n) => document.querySelector(`#answers-${n} .assistant`)?.textContent.length ?? 0));
    new MutationObserver(look).observe(document.getElementById("columns"), { childList: true, subtree: true, characterData: true });
  });
  await page.fill("#tokens", "12");
  await page.keyboard.press("Tab");
  await page.focus("#prompt");
  await page.keyboard.type("Shares rose");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelectorAll(".figures").length === 2);
  const answers = (kind) => page.evaluate((kind) => [0, 1].map((n) => [...document.querySelectorAll(`#answers-${n} .${kind}`)].map((found) => found.textContent)), kind);
  seen.chat = await answers("assistant");
  seen.figures = await answers("figures");
  seen.steps = await page.evaluate(() => [0, 1].map((n) => new Set(window.lengths.map((both) => both[n])).size));

  // The second turn includes the first one.
  await page.keyboard.type("And then?");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelectorAll(".figures").length === 4);
  seen.turns = await answers("assistant");
  seen.views = {};
  for (const { name, width, height, colorScheme } of VIEWS) {
    await page.emulateMedia({ colorScheme });
    await page.setViewportSize({ width, height });
    await page.screenshot({ path: join(screenshots, `${name}.png`) });
    seen.views[name] = await page.evaluate(() => ({
      overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      columns: getComputedStyle(document.getElementById("columns")).gridTemplateColumns.split(" ").length,
      background: getComputedStyle(document.documentElement).backgroundColor,
      sendable: document.getElementById("send").getBoundingClientRect().bottom <= innerHeight,
    }));
  }

  // Without a chat template, with the base only.
  await page.click("#clear");
  await page.uncheck("#chat");
  await page.selectOption("#model-0", seen.models[0].replace(" (base)", ""));
  await page.selectOption("#model-1", "");
  await page.fill("#prompt", "Shares rose");
  await page.click("#send");
  await page.waitForFunction(() => document.querySelectorAll(".figures").length === 1);
  seen.plain = await answers("assistant");

  // A refusal of the service is shown, and the next prompt can be sent.
  await page.fill("#prompt", "word ".repeat(200));
  await page.click("#send");
  await page.waitForSelector(".wrong");
  seen.wrong = await answers("wrong");
  seen.enabled = await page.locator("#send").isEnabled();

  // A long answer is stopped.
  await page.fill("#tokens", "100");
  await page.fill("#temperature", "1.5");
  await page.fill("#prompt", "The");
  await page.evaluate(() => {
    document.getElementById("send").click();
    document.getElementById("stop").click(); // in the same task, before any response
  });
  await page.waitForFunction(() => !document.getElementById("send").disabled);
  seen.stopped = await answers("figures");
  seen.hosts = [...hosts];
  console.log(JSON.stringify(seen));
} finally {
  await context.close();
  rmSync(profile, { recursive: true, force: true });
}
