"""Trained rows of an embedding (trainable tokens) as low-rank side inputs.

Replacing a row of the base, W[i] ← v, is an update of rank 1: W + e_i (v − W[i])ᵀ, with the unit
vector e_i of the token. So k trained tokens are factors of rank k, for the embedding and for every
module that shares its weight, such as a tied output head:

    embedding   A [vocabulary, k] has the unit vectors, B [k, size] the differences
    head        A [size, k] has the differences, B [k, vocabulary] the unit vectors

They are concatenated with the adapter's factors for the same module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.adapter import Adapter
from loradeploy.bundle.fitting.fit import row_users
from loradeploy.bundle.manifest import LoraTarget, Manifest
from loradeploy.errors import AdapterMismatchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.adapter_inputs.base import BaseValues

# A [in, rank] and B [rank, out] in float32, with the scaling in B.
Pair = tuple["NDArray[np.float32]", "NDArray[np.float32]"]


def token_factors(adapter: Adapter, manifest: Manifest, base: BaseValues | None) -> dict[str, Pair]:
    """The factors of the trained rows of an adapter that fits, by module.

    Raises:
        AdapterMismatchError: `base` lacks the weight, which is quantized.
    """
    if not adapter.rows:
        return {}
    users = row_users(manifest)
    targets = {target.module: target for target in manifest.targets}
    found: dict[str, Pair] = {}
    for parameter, rows in sorted(adapter.rows.items()):
        indices = list(rows.indices)
        own = None  # the base's rows, read from the first module: all modules share one weight
        for module in sorted(users[parameter], key=lambda name: targets[name].kind):
            if f"{module}.weight" in adapter.saved or module in found:
                continue  # replaced as a whole, or its rows were trained to the same values
            target = targets[module]
            if own is None:
                own = _rows(base, target, indices, manifest)
            differences = rows.values.astype(np.float32) - own  # [tokens, size]
            tokens = target.in_features if target.kind == "embedding" else target.out_features
            units = np.zeros((tokens, len(indices)), np.float32)
            units[indices, np.arange(len(indices))] = 1
            found[module] = (
                (units, differences) if target.kind == "embedding" else (differences.T, units.T)
            )
    return found


def joined(one: Pair | None, other: Pair | None) -> Pair | None:
    """The factors of the sum of two updates."""
    if one is None or other is None:
        return one if other is None else other
    return np.concatenate([one[0], other[0]], axis=1), np.concatenate([one[1], other[1]])


def _rows(
    base: BaseValues | None, target: LoraTarget, indices: list[int], manifest: Manifest
) -> NDArray[Any]:
    """The base's rows [tokens, size] of the weight of `target`; zeros for added tokens."""
    added = manifest.added_tokens
    if added is not None and min(indices, default=0) >= added.base:
        size = target.out_features if target.kind == "embedding" else target.in_features
        return np.zeros((len(indices), size), np.float32)
    W = None if base is None else base.weight(target)
    if W is None:
        raise AdapterMismatchError(
            f"rows of {target.module}.weight were trained (trainable_token_indices), and the base's"
            " own are quantized here and cannot be read: export the unquantized base with this"
            " adapter"
        )
    return W.T[indices] if target.kind == "embedding" else W[indices]
