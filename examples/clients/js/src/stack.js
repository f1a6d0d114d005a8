// Stacks the side inputs of a batch in which each row has its own adapter.
import { BundleError } from "./errors.js";
import { zeros } from "./floats.js";
import { asStored, readTensors } from "./safetensors.js";
import { LIMITS } from "./source.js";

const FILE = "required.safetensors";

/** The base's values of the side inputs that are not factors: a Map of name → { shape, data }. */
export async function readBase(source, manifest) {
  const found = new Map();
  if (manifest.sideInputs.size === 0) return found;
  const where = source.where(FILE);
  const { tensors } = readTensors(await source.bytes(FILE, LIMITS.graph, BundleError), where, BundleError);
  for (const [name, { shape, kind }] of manifest.sideInputs) {
    const tensor = tensors.get(name);
    if (tensor === undefined) throw new BundleError(`${where} lacks ${name}: export the bundle again`);
    if (kind !== "whole") continue;
    const stored = asStored(tensor);
    const needed = [1, ...shape.slice(1)];
    if (stored?.dtype !== manifest.factor_dtype || String(tensor.shape) !== String(needed)) {
      throw new BundleError(`${where}: ${name} is ${tensor.dtype} [${tensor.shape}], not [${needed}]`);
    }
    found.set(name, { shape: needed, data: stored.data });
  }
  return found;
}

/**
 * All side inputs for `rows`, each an adapter's side inputs or null for the base: an object of
 * name → { type, data, dims }.
 *
 * With the layout "slots", each adapter has one slot, and `adapter_ids` is the slot of each row; with
 * "rows", slot i belongs to row i, or a single slot to all rows. Factors are padded with zeros to the
 * largest rank of their module, at least `leastRank`.
 */
export function stack(rows, base, manifest, leastRank) {
  const unique = [...new Set(rows)];
  const bySlot = manifest.layout === "slots";
  const slots = bySlot || unique.length === 1 ? unique : rows;
  const type = manifest.factor_dtype;
  const feeds = {};
  for (const [name, { shape, kind }] of manifest.sideInputs) {
    const own = slots.map((slot) => slot?.get(name) ?? base.get(name));
    feeds[name] = { type, ...joined(own, shape, kind, type, leastRank) };
  }
  if (bySlot && manifest.sideInputs.size) {
    const ids = BigInt64Array.from(rows, (row) => BigInt(unique.indexOf(row)));
    feeds.adapter_ids = { type: "int64", data: ids, dims: [rows.length] };
  }
  if (manifest.branches) {
    const mode = unique.some((row) => row !== null) ? 1n : 0n;
    feeds.adapter_mode = { type: "int64", data: BigInt64Array.of(mode), dims: [1] };
  }
  return feeds;
}

function joined(own, shape, kind, type, leastRank) {
  const axis = shape.indexOf("rank");
  const ranks = own.map((slot) => slot?.shape[axis] ?? 0);
  const rank = Math.max(leastRank, ...(kind === "whole" ? [0] : ranks));
  const dims = shape.map((size) => ({ adapters: own.length, rank })[size] ?? size);
  if (own.length === 1 && own[0] && (kind === "whole" || ranks[0] === rank)) return { data: own[0].data, dims };
  const size = dims.slice(1).reduce((product, side) => product * side, 1);
  const data = zeros(type, own.length * size);
  own.forEach((slot, index) => {
    if (!slot) return;
    if (kind !== "A" || ranks[index] === rank) {
      data.set(slot.data, index * size); // B is padded after its own rows
      return;
    }
    for (let input = 0; input < dims[1]; ++input) {
      const part = slot.data.subarray(input * ranks[index], (input + 1) * ranks[index]);
      data.set(part, index * size + input * rank);
    }
  });
  return { data, dims };
}
