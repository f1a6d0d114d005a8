"""Copy adapters into fixed slots on the device, whose buffers keep their addresses.

A recorded graph reads the addresses that were bound when it was recorded. There is one set of
buffers for each number of slots and rank, which are rounded up so that few sets serve all batches.
The adapters of a run are copied into a set.
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

# The minimum rank of a set: kernels process multiples of 8.
_LEAST_RANK: Final = 8
_UNKNOWN: Final = "written in part"
_MIB: Final = 1 << 20

Sized = tuple[int, int]  # slots and rank of a set


@dataclass(eq=False)
class SlotSet:
    """The side inputs [slots, …] on the device, and the adapters in their slots.

    `arrays`: copies on the host, from which the device's are updated. `members`: the digest of the
    adapter in each slot, None for the base.
    """

    arrays: dict[str, NDArray[Any]]
    values: dict[str, onnxruntime.OrtValue]
    members: list[str | None]

    @property
    def nbytes(self) -> int:
        """The size of the buffers in bytes."""
        return sum(values.nbytes for values in self.arrays.values())


@dataclass(frozen=True, eq=False)
class Slotted:
    """The buffers in which a run reads its adapters.

    `size`: the size of the set, part of a recording's key. `values`: its buffers. `ids`: the slot
    of each row, int64 [rows]; None if all rows use slot 0, or each its own.
    """

    size: Sized
    values: Mapping[str, onnxruntime.OrtValue]
    ids: NDArray[np.int64] | None


class FixedSlots:
    """The slot sets of one session. Not thread-safe.

    `defaults`: the base's values of parameters that adapters replace, by side input, [1, …].
    `device`: where the buffers are, in onnxruntime's terms. `budget`: their maximum size in bytes.
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
        """The size of all buffers in bytes."""
        return sum(own.nbytes for own in self._sets.values())

    def write(self, lease: Lease) -> Slotted | None:
        """Write the adapters of `lease` into the slots of a set; return None for the base.

        Slots that contain the right adapter already are not written.

        Raises:
            BudgetError: the buffers do not fit into the budget.
        """
        members = used(lease.rows)
        if not members:
            return None
        rank = self._rank(members)
        one = len(members) == 1 and None not in lease.rows
        if one or self._in_rows:
            in_order = members if one else lease.rows
            size = len(in_order), rank
            own = self._set(size)
            self._fill(own, dict(enumerate(in_order)))
            return Slotted(size, own.values, None)
        size = _power_of_two(len(members) + 1), rank
        own = self._set(size)
        slots = _assigned(own.members, members)
        self._fill(own, dict(zip(slots.values(), members, strict=True)))
        ids = np.array([0 if r is None else slots[r.digest] for r in lease.rows], np.int64)
        return Slotted(size, own.values, ids)

    def _fill(self, own: SlotSet, expected: Mapping[int, Resident | None]) -> None:
        """Write the `expected` adapters into their slots, where others are."""
        digests = {s: None if r is None else r.digest for s, r in expected.items()}
        stale = [slot for slot, digest in digests.items() if own.members[slot] != digest]
        if not stale:
            return
        for slot in stale:
            own.members[slot] = _UNKNOWN  # until it is written completely
            self._filler.write(own.arrays, slot, expected[slot])
        if self._device[0] != HOST:  # on the host, the buffers are the arrays
            for name, values in own.arrays.items():
                own.values[name].update_inplace(values)
        for slot in stale:
            own.members[slot] = digests[slot]

    def _set(self, size: Sized) -> SlotSet:
        """The set of this size, allocated at its first use."""
        if size in self._sets:
            return self._sets[size]
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
    """Assign a slot to each of `members`, by digest: its current one, or one not in use by them.

    Slot 0 is the base.
    """
    digests = {member.digest for member in members}
    slots = {digest: slot for slot, digest in enumerate(held) if slot and digest in digests}
    free = [slot for slot in range(1, len(held)) if slot not in slots.values()]
    for member in members:
        if member.digest not in slots:
            slots[member.digest] = free.pop(0)
    return {member.digest: slots[member.digest] for member in members}


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
