"""Adapters in fixed slots of the device: buffers that keep their address, written at a swap.

A graph that a device has recorded reads the addresses that were bound when it was recorded. So
there is one set of buffers for a number of slots and a rank, which are rounded up so that few sets
serve all batches, and the adapters of a run are copied into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime

from loradeploy.bundle.names import ROWS
from loradeploy.errors import BudgetError
from loradeploy.runtime.adapters.filling import Filler
from loradeploy.runtime.adapters.leases import Lease
from loradeploy.runtime.adapters.resident import Arrays, Resident, used
from loradeploy.runtime.adapters.stacks import HOST

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest

# The least rank of a set: kernels take multiples of 8.
_LEAST_RANK: Final = 8
_UNKNOWN: Final = "written in part"
_MIB: Final = 1 << 20

Sized = tuple[int, int]  # slots and rank of a set


@dataclass(eq=False)
class SlotSet:
    """The side inputs [slots, …, rank, …] on the device, and what their slots hold.

    `arrays`: the same on the host, which is what is copied. `members`: the digest of each slot's
    adapter, None for the base.
    """

    arrays: dict[str, NDArray[Any]]
    values: dict[str, onnxruntime.OrtValue]
    members: list[str | None]

    @property
    def nbytes(self) -> int:
        """The bytes of the buffers."""
        return sum(values.nbytes for values in self.arrays.values())


@dataclass(frozen=True, eq=False)
class Slotted:
    """The adapters of a run where it reads them.

    `size`: of the set, by which recordings differ. `values`: its buffers. `ids`: the slot of each
    row, int64 [rows]; None where all rows use slot 0, or each its own.
    """

    size: Sized
    values: Mapping[str, onnxruntime.OrtValue]
    ids: NDArray[np.int64] | None


class FixedSlots:
    """The sets of slots of one session. Its user calls it from one thread at a time.

    `defaults`: what the base has where adapters replace whole parameters, by side input, [1, …].
    `device`: where the buffers live, in onnxruntime's words. `budget`: their bytes at most.
    """

    def __init__(
        self, manifest: Manifest, defaults: Arrays, device: tuple[str, int], budget: int | None
    ) -> None:
        self._filler = Filler(manifest, defaults)
        self._in_rows = manifest.layout == ROWS
        self._device, self._budget = device, budget
        self._sets: dict[Sized, SlotSet] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers."""
        return sum(own.nbytes for own in self._sets.values())

    def write(self, lease: Lease) -> Slotted | None:
        """Have the slots of a set hold the adapters of `lease`; None where it is the base's.

        What a slot holds already is not written again.

        Raises:
            BudgetError: the buffers do not fit in the budget.
        """
        members = used(lease.rows)
        if not members:
            return None
        one = len(members) == 1 and None not in lease.rows
        ids = None
        if one:
            wanted: dict[int, Resident | None] = {0: members[0]}
            count = 1
        elif self._in_rows:
            wanted = dict(enumerate(lease.rows))
            count = len(lease.rows)
        else:
            count = _power_of_two(len(members) + 1)
        size = count, self._rank(members)
        own = self._sets.get(size) or self._allocate(size)
        if not one and not self._in_rows:
            slots = _assigned(own.members, members)
            wanted = dict(zip(slots.values(), members, strict=True))
            ids = np.array([0 if r is None else slots[r.digest] for r in lease.rows], np.int64)
        self._fill(own, wanted)
        return Slotted(size, own.values, ids)

    def _fill(self, own: SlotSet, wanted: Mapping[int, Resident | None]) -> None:
        digests = {s: None if r is None else r.digest for s, r in wanted.items()}
        stale = [slot for slot, digest in digests.items() if own.members[slot] != digest]
        if not stale:
            return
        for slot in stale:
            own.members[slot] = _UNKNOWN  # until all of it is there
            self._filler.write(own.arrays, slot, wanted[slot])
        if self._device[0] != HOST:  # there the buffers are the arrays
            for name, values in own.arrays.items():
                own.values[name].update_inplace(values)
        for slot in stale:
            own.members[slot] = digests[slot]

    def _allocate(self, size: Sized) -> SlotSet:
        count, rank = size
        ranks = self._filler.ranks((), rank)
        shapes = self._filler.shapes(count, ranks).values()
        needed = sum(int(np.prod(shape)) for shape in shapes) * self._filler.dtype.itemsize
        if self._budget is not None and self.nbytes + needed > self._budget:
            raise BudgetError(
                f"{count} slots of rank {rank} take {needed / _MIB:.1f} MiB beside"
                f" {self.nbytes / _MIB:.1f} MiB of slots, the whole device_budget is"
                f" {self._budget / _MIB:.1f} MiB: give the session more, or smaller batches"
            )
        arrays = self._filler.empty(count, ranks)
        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(numbers, *self._device)
            for name, numbers in arrays.items()
        }
        self._sets[size] = SlotSet(arrays, values, [None] * count)
        return self._sets[size]

    def _rank(self, members: Sequence[Resident]) -> int:
        largest = max(self._filler.ranks(members, 0).values(), default=0)
        return max(_LEAST_RANK, _power_of_two(largest))


def _assigned(held: Sequence[str | None], members: Sequence[Resident]) -> dict[str, int]:
    """A slot for each of `members`, by digest: the one that it has, else one that none of them has.

    Slot 0 is the base's.
    """
    digests = {member.digest for member in members}
    slots = {digest: slot for slot, digest in enumerate(held) if slot and digest in digests}
    free = [slot for slot in range(1, len(held)) if slot not in slots.values()]
    for member in members:
        if member.digest not in slots:
            slots[member.digest] = free.pop(0)
    return {member.digest: slots[member.digest] for member in members}


def _power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()
