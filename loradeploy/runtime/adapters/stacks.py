"""Stack side inputs of several adapters in one tensor each, zero-padded to a common rank.

In a graph with `adapter_ids`, a stack has a slot for each adapter, and one for the base if a batch
needs it, and serves every batch of them. It grows by half up to a limit; then the least recently
used slot is replaced. On the host, this writes one adapter's factors; the copy on a device is made
again. In a graph with a slot for each row, the slots are the rows (row_stacks.py).

On the host, an adapter of the stack's ranks is in memory once: its slot is its home, and its own
arrays become views of it. If the slot is needed for another adapter, it gets arrays of its own
again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import onnxruntime

from loradeploy.bundle.adapter_inputs.changes import change_inputs
from loradeploy.bundle.adapter_inputs.factors import branch_choice
from loradeploy.bundle.manifest import RANK
from loradeploy.runtime.adapters.block import in_one_block
from loradeploy.runtime.adapters.filling import Filler
from loradeploy.runtime.adapters.resident import Arrays, Bindable, Resident, SideInputs, used

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest

# Maximum slots without a budget. Slots beyond the rows of a batch only save rewriting.
_SLOTS: Final = 64
HOST: Final = "cpu"  # onnxruntime's name of host memory


@dataclass(eq=False)
class Stack:
    """A stack of adapters.

    `slots`: slot by digest, ordered by last use; None is the base. `homes`: by digest, the adapters
    whose arrays are views of their slots.
    """

    arrays: dict[str, NDArray[Any]]
    device: Bindable
    slots: dict[str | None, int] = field(default_factory=dict)
    homes: dict[str, Resident] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors on the device."""
        return sum(values.nbytes for values in self.arrays.values())

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return len(next(iter(self.arrays.values())))

    def views(self, resident: Resident) -> dict[str, NDArray[Any]] | None:
        """The arrays of `resident` in its slot; None if they have other ranks there."""
        slot, host = self.slots[resident.digest], resident.host
        if any(self.arrays[name].shape[1:] != values.shape[1:] for name, values in host.items()):
            return None
        return {name: self.arrays[name][slot : slot + 1] for name in host}


class Move(Protocol):
    """Replaces the arrays of an adapter by a copy, for later runs; see `Leases`."""

    def __call__(self, resident: Resident, arrays: Arrays, *, unless_used: bool = False) -> bool:
        """Return False, without an effect, if it is in use and must not be (`unless_used`)."""


class Stacks:
    """Makes and caches the stack that mixed batches read. Not thread-safe.

    `budget`: the maximum size of the tensors in bytes, unless a single batch needs more.
    `base`: what is bound for the base; if it is not empty, side inputs must not have rank 0.
    """

    def __init__(
        self,
        sides: SideInputs,
        budget: int | None,
        base: Bindable,
        move: Move,
    ) -> None:
        self._manifest = sides.manifest
        self._device = sides.device
        self._budget = budget
        self._base = base
        self._least_rank = 1 if base.values else 0
        self._targets = sides.manifest.targets
        self._fill = Filler(sides.manifest, sides.defaults, ranked=sides.ranked)
        self._move = move
        self._stack: Stack | None = None

    @property
    def nbytes(self) -> int:
        """The size of the stack in bytes."""
        return 0 if self._stack is None else self._stack.nbytes

    def clear(self) -> None:
        """Drop a stack beyond the budget, which no run may be reading."""
        self._stack = None

    def drop(self, resident: Resident) -> None:
        """Forget an adapter that has left the bank. Its slot can be used again."""
        stack = self._stack
        if stack is not None and stack.homes.get(resident.digest) is resident:
            stack.homes.pop(resident.digest, None)

    def of(
        self, members: Sequence[Resident], busy: Collection[str], *, base: bool
    ) -> tuple[Bindable, Mapping[str | None, int]]:
        """Return tensors of a stack that contains `members`, and the slots by digest.

        `base`: whether a slot has the base; its digest is None.
        The slots of the adapters in `busy`, by digest, are not overwritten, because runs may read
        them. An adapter that another thread starts to use after `busy` was determined has no slot
        yet, or is moved out of it before it is used, or keeps it.
        """
        wanted: dict[str | None, Resident | None] = {m.digest: m for m in members}
        if base:
            wanted[None] = None
        stack = self._stack
        if stack is None or not (
            self._fits_into(stack, wanted, busy) and self._place(stack, wanted, busy)
        ):
            self._stack = stack = self._larger(stack, wanted)
        for digest in wanted:
            stack.slots[digest] = stack.slots.pop(digest)
        for member in members:
            self._house(stack, member)
        return stack.device, {digest: stack.slots[digest] for digest in wanted}

    def _fits_into(
        self, stack: Stack, wanted: Mapping[str | None, Resident | None], busy: Collection[str]
    ) -> bool:
        new = [one for digest, one in wanted.items() if digest not in stack.slots]
        if not new:
            return True
        if self._device[0] != HOST:
            return False
        ranks = self._fill.ranks(used(new), self._least_rank)
        if any(ranks[t.lora_A] > stack.arrays[t.lora_A].shape[2] for t in self._targets):
            return False
        free = stack.capacity - len(stack.slots)
        if len(new) <= free:
            return True
        most = self._most(stack.nbytes // stack.capacity)
        if min(_grown(stack.capacity), most) > stack.capacity:
            return False
        return len(new) <= free + len(_idle(stack, busy))  # the members are in use

    def _place(
        self, stack: Stack, wanted: Mapping[str | None, Resident | None], busy: Collection[str]
    ) -> bool:
        """Write what is new in `wanted` into free slots, or those of idle adapters.

        Return False if there are not enough, because adapters have come into use.
        """
        for digest, one in wanted.items():
            if digest in stack.slots:
                continue
            taken = set(stack.slots.values())
            free = next((slot for slot in range(stack.capacity) if slot not in taken), None)
            if free is None:
                free = self._vacated(stack, busy)
            if free is None:
                return False
            self._fill.write(stack.arrays, free, one)
            stack.slots[digest] = free
        return True

    def _vacated(self, stack: Stack, busy: Collection[str]) -> int | None:
        """Take the slot of the least recently used idle adapter; first, of those not in the bank.

        An adapter that is at home there gets arrays of its own, unless it is in use meanwhile. None
        if all are.
        """
        for digest in sorted(_idle(stack, busy), key=stack.homes.__contains__):
            resident = stack.homes.get(digest)
            if resident is not None:
                own = in_one_block(resident.host)
                if not self._move(resident, own, unless_used=True):
                    continue
                stack.homes.pop(digest, None)
            return stack.slots.pop(digest)
        return None

    def _house(self, stack: Stack, resident: Resident) -> bool:
        """Make the slot of `resident` its home, if possible."""
        if stack.homes.get(resident.digest) is resident:
            return True
        # A stack beyond the budget is dropped as soon as no run reads it.
        if self._device[0] != HOST or (self._budget is not None and stack.nbytes > self._budget):
            return False
        views = stack.views(resident)
        if views is None:
            return False
        stack.homes[resident.digest] = resident
        return self._move(resident, views)

    def _larger(self, stack: Stack | None, wanted: Mapping[str | None, Resident | None]) -> Stack:
        """Make a stack of `wanted` and, if there is room, of adapters in `stack`."""
        members = used(list(wanted.values()))
        ranks = self._fill.ranks(members, self._least_rank)
        before = 0 if stack is None else stack.capacity
        if stack is not None:
            for target in self._targets:
                held = stack.arrays[target.lora_A].shape[2]
                ranks[target.lora_A] = max(ranks[target.lora_A], held)
        new = [digest for digest in wanted if stack is None or digest not in stack.slots]
        count = len(new) if stack is None else max(len(stack.slots) + len(new), before)
        if stack is not None and count > before and new != [None]:  # the base comes only once
            count = max(count, _grown(before))
        capacity = max(len(wanted), min(count, self._most(self._fill.slot_bytes(ranks))))
        larger = Stack(self._fill.unfilled(capacity, ranks), Bindable({}))
        if stack is not None:
            self._copy(stack, larger, wanted)
        for digest, one in wanted.items():
            if digest not in larger.slots:
                slot = len(larger.slots)
                self._fill.write(larger.arrays, slot, one)
                larger.slots[digest] = slot
        larger.device = self._bindable(larger.arrays)
        return larger

    def _copy(self, old: Stack, new: Stack, wanted: Collection[str | None]) -> None:
        """Copy what is wanted and, if there is room, the base and the most recently used others."""
        room = new.capacity - len(wanted)
        others = [digest for digest in old.slots if digest not in wanted]
        others.sort(key=lambda digest: digest is None)
        kept = others[max(0, len(others) - room) :] + [d for d in old.slots if d in wanted]
        for slot, digest in enumerate(kept):
            for name, values in old.arrays.items():
                # Only the rank may be larger: the last axis of A, the second of B without the
                # slots.
                place = tuple(slice(size) for size in values.shape[1:])
                if values.shape[1:] != new.arrays[name].shape[1:]:
                    new.arrays[name][slot] = 0
                new.arrays[name][slot][place] = values[old.slots[digest]]
            new.slots[digest] = slot
        for digest, resident in list(old.homes.items()):
            if digest not in new.slots or not self._house(new, resident):
                self._move(resident, in_one_block(resident.host))

    def _most(self, slot_bytes: int) -> int:
        """The maximum number of slots."""
        if self._budget is None:
            return _SLOTS
        return max(1, self._budget // max(slot_bytes, 1))

    def _bindable(self, arrays: Mapping[str, NDArray[Any]]) -> Bindable:
        return bindable(arrays, self._manifest, self._device, self._base)


def _grown(capacity: int) -> int:
    """The next larger number of slots."""
    return capacity + max(1, capacity // 2)


def _idle(stack: Stack, busy: Collection[str]) -> list[str]:
    """The adapters in `stack` that are not in use, by their last use; never the base."""
    return [digest for digest in stack.slots if digest is not None and digest not in busy]


def neutral(sides: SideInputs) -> Bindable:
    """Every side input of the graph with the base's values; factors are zeros of minimal rank."""
    manifest, device = sides.manifest, sides.device
    changes = change_inputs(manifest)
    ranks = {name: t.rank_from(1) for t in manifest.targets for name in t.factors}
    values = {}
    for spec in manifest.side_inputs():
        sizes = {RANK: ranks.get(spec.name, 1)}
        shape = tuple(size if isinstance(size, int) else sizes.get(size, 1) for size in spec.shape)
        numbers = sides.defaults.get(spec.name)
        if numbers is None:
            numbers = np.zeros(shape, spec.dtype)
            numbers[...] = changes.get(spec.name, 0)
        # Inputs that choose slots and branches are read on the host.
        where = (HOST, 0) if spec.dtype == "int64" else device
        values[spec.name] = onnxruntime.OrtValue.ortvalue_from_numpy(numbers, *where)
    return Bindable(values)


def bindable(
    arrays: Arrays, manifest: Manifest, device: tuple[str, int], base: Bindable
) -> Bindable:
    """`arrays` on the device, and the input that chooses the graph's branch, if it has one.

    On the host, these are views that keep their arrays alive. Other side inputs are bound as in
    `base`.
    """
    values = dict(base.values)
    for name, numbers in arrays.items():
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(
            np.ascontiguousarray(numbers), *device
        )
    for name, number in branch_choice(manifest).items():
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(number)
    return Bindable(values)
