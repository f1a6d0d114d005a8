// Blends several adapters into one: the weighted sum of their updates.
import { UsageError } from "./errors.js";
import { fromHalf, toHalf, zeros } from "./floats.js";

/** The adapters in `spec` as [name, weight], sorted by name; a name alone has the weight 1. */
export function membersOf(spec) {
  if (typeof spec === "string") return [[spec, 1]];
  if (typeof spec !== "object" || Array.isArray(spec)) {
    throw new UsageError(`an adapter is ${JSON.stringify(spec)}: give a name, null for the base, or weights by name`);
  }
  const members = Object.entries(spec).sort(([one], [other]) => (one < other ? -1 : 1));
  if (!members.length) throw new UsageError("a blend names no adapter: give { name: weight }, or null for the base");
  for (const [name, weight] of members) {
    if (!Number.isFinite(weight) || !Number.isFinite(Math.fround(weight))) {
      throw new UsageError(`the weight of ${JSON.stringify(name)} is ${weight}: give a finite number`);
    }
  }
  return members;
}

/**
 * Σ weight · adapter: the factors concatenated along the rank, with the weights in B.
 *
 * `members`: pairs of side inputs, a Map of name → { dtype, shape, data }, and a weight.
 */
export function blend(members, manifest) {
  const factors = new Set(manifest.targets.flatMap(({ lora_A, lora_B }) => [lora_A, lora_B]));
  for (const [own] of members) {
    const more = [...own.keys()].find((name) => !factors.has(name));
    if (more) {
      throw new UsageError(`an adapter with ${more} cannot be blended: only low-rank factors can be scaled and added`);
    }
  }
  const found = new Map();
  for (const { lora_A, lora_B, in_features, out_features } of manifest.targets) {
    const touched = members.filter(([own]) => own.has(lora_A));
    if (!touched.length) continue;
    const dtype = manifest.factor_dtype;
    const ranks = touched.map(([own]) => own.get(lora_A).shape[2]);
    const rank = ranks.reduce((sum, own) => sum + own, 0);
    const A = zeros(dtype, in_features * rank);
    const B = zeros(dtype, rank * out_features);
    let begin = 0;
    touched.forEach(([own, weight], index) => {
      const a = own.get(lora_A).data;
      for (let input = 0; input < in_features; ++input) {
        A.set(a.subarray(input * ranks[index], (input + 1) * ranks[index]), input * rank + begin);
      }
      B.set(scaled(own.get(lora_B).data, weight, dtype), begin * out_features);
      begin += ranks[index];
    });
    if (!B.every((value) => (dtype === "float16" ? (value & 0x7c00) !== 0x7c00 : Math.abs(value) <= 1e18))) {
      const weights = members.map(([, weight]) => weight).join(", ");
      throw new UsageError(`the weights ${weights} of a blend do not fit into ${dtype}: give smaller ones`);
    }
    found.set(lora_A, { dtype, shape: [1, in_features, rank], data: A });
    found.set(lora_B, { dtype, shape: [1, rank, out_features], data: B });
  }
  return found;
}

/** `values` times `weight`, rounded once to the graph's dtype. */
function scaled(values, weight, dtype) {
  if (dtype !== "float16") return values.map((value) => value * Math.fround(weight));
  const factor = fromHalf(toHalf(weight));
  return values.map((half) => toHalf(fromHalf(half) * factor));
}
