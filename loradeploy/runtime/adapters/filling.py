"""Fill arrays with the side inputs of several adapters: a slot for each, zero-padded in rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.adapter_inputs.changes import change_inputs
from loradeploy.bundle.names import ADAPTER_RANKS
from loradeploy.runtime.adapters.block import empty_block
from loradeploy.runtime.adapters.resident import Arrays, Resident

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest


class Filler:
    """Allocates arrays [slots, …] for the side inputs of a bundle, and writes adapters into them.

    `defaults`: the base's values of parameters that adapters replace, by side input, [1, …].
    `ranked`: whether `adapter_ranks` is one of the arrays.
    """

    def __init__(self, manifest: Manifest, defaults: Arrays, *, ranked: bool = False) -> None:
        self._targets, self._saved = manifest.targets, manifest.saved
        self._defaults = defaults
        self._changes = change_inputs(manifest)
        self._ranked = ranked
        self.dtype = np.dtype(manifest.factor_dtype)

    def ranks(self, residents: Sequence[Resident], least: int) -> dict[str, int]:
        """The largest rank of each target module, by name of lora_A; `least` without factors.

        For the experts of a mixture it is rounded up to a rank that they can have.
        """
        return {
            target.lora_A: target.rank_from(
                max(
                    (r.host[target.lora_A].shape[2] for r in residents if target.lora_A in r.host),
                    default=least,
                )
            )
            for target in self._targets
        }

    def slot_bytes(self, ranks: Mapping[str, int]) -> int:
        """The size of one slot of all side inputs."""
        return self.dtype.itemsize * sum(map(math.prod, self.shapes(1, ranks).values()))

    def shapes(self, slots: int, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The shapes of the side inputs [slots, …]."""
        shapes: dict[str, tuple[int, ...]] = {}
        for target in self._targets:
            rank = ranks[target.lora_A]
            shapes[target.lora_A] = (slots, target.in_features, rank)
            shapes[target.lora_B] = (slots, rank, target.out_features)
        for saved in self._saved:
            shapes[saved.input] = (slots, *saved.slot_shape)
        return shapes | {n: (slots, len(own)) for n, own in self._changes.items()}

    def unfilled(self, slots: int, ranks: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """Uninitialized side inputs [slots, …]; each slot must be written before it is read."""
        arrays = empty_block(self.shapes(slots, ranks), self.dtype)
        if self._ranked:
            arrays[ADAPTER_RANKS] = np.empty((slots, len(self._targets)), np.int64)
        return arrays

    def empty(self, slots: int, ranks: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """The side inputs [slots, …] with the base in every slot."""
        arrays = self.unfilled(slots, ranks)
        for name, values in arrays.items():
            values[...] = self._defaults.get(name, self._changes.get(name, 0))
        return arrays

    def write(
        self, arrays: Mapping[str, NDArray[Any]], slot: int, resident: Resident | None
    ) -> None:
        """Write an adapter, or the base, into a slot that may contain another adapter."""
        host: Arrays = {} if resident is None else resident.host
        for index, target in enumerate(self._targets):
            A, B = arrays[target.lora_A][slot], arrays[target.lora_B][slot]
            rank = host[target.lora_A].shape[2] if target.lora_A in host else 0
            if rank:
                A[:, :rank], B[:rank] = host[target.lora_A][0], host[target.lora_B][0]
            if self._ranked:
                arrays[ADAPTER_RANKS][slot, index] = rank
            # Zeros in B alone would not suffice: the padding of A may contain values that are not
            # finite.
            A[:, rank:], B[rank:] = 0, 0
        for saved in self._saved:
            arrays[saved.input][slot] = host.get(saved.input, self._defaults[saved.input])[0]
        for name, neutral in self._changes.items():
            arrays[name][slot] = host[name][0] if name in host else neutral
