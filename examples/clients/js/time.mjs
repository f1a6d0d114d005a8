// Times a bundle in Node: node time.mjs BUNDLE [ADAPTER]
//
// Prints the milliseconds to load it, to the first token after a prompt of 128 tokens, and for each further
// token: medians of 5 rounds in which the base, the adapter and the base again, as a control, alternate.
import { load } from "./index.js";

const [bundle, adapter] = process.argv.slice(2);
if (!bundle) {
  console.error("give a bundle of `loradeploy export --required-inputs`: node time.mjs BUNDLE [ADAPTER]");
  process.exit(2);
}
const begin = performance.now();
const model = await load(bundle);
const figures = { load: performance.now() - begin };
if (adapter) await model.addAdapter("timed", adapter);
const prompt = Array.from({ length: 128 }, (_, index) => 100 + index);
const sides = { base: null, ...(adapter ? { adapter: "timed" } : {}), "base again": null };

async function timed(name, maxNewTokens) {
  const start = performance.now();
  const { tokenIds } = await model.generate({ prompt, adapter: name, maxNewTokens });
  return [performance.now() - start, tokenIds.length];
}

const median = (values) => values.sort((one, other) => one - other)[values.length >> 1];
const rounds = {};
for (let round = 0; round < 6; ++round) {
  for (const [side, name] of Object.entries(sides)) {
    const [first] = await timed(name, 1);
    const [all, count] = await timed(name, 17);
    if (round) (rounds[side] ??= []).push([first, (all - first) / Math.max(count - 1, 1)]); // round 0 warms up
  }
}
for (const [side, pairs] of Object.entries(rounds)) {
  figures[side] = { first: median(pairs.map(([first]) => first)), token: median(pairs.map(([, token]) => token)) };
}
figures.megabytes = process.resourceUsage().maxRSS / 1024;
console.log(JSON.stringify(figures, (_, value) => (typeof value === "number" ? Math.round(value * 10) / 10 : value), 2));
