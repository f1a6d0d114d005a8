"""Stack side inputs of several adapters in one tensor each, zero-padded to a common rank.

In a graph with `adapter_ids`, a stack has a slot for the base and one for each adapter, and serves
every batch of them. It doubles in size up to a limit; then the least recently used slot is
replaced. On the host, this writes one adapter's factors; the copy on a device is made again. In a
graph with a slot for each row, the slots are the rows (row_stacks.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime

from loradeploy.bundle.adapter_inputs.changes import change_inputs
from loradeploy.bundle.adapter_inputs.factors import branch_choice
from loradeploy.bundle.manifest import RANK
from loradeploy.runtime.adapters.filling import Filler
from loradeploy.runtime.adapters.resident import Arrays, Bindable, Resident

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest

# Maximum slots without a budget. Slots beyond the rows of a batch only save rewriting.
_SLOTS: Final = 64
HOST: Final = "cpu"  # onnxruntime's name of host memory


@dataclass(eq=False)
class Stack:
    """A stack of adapters. `slots`: slot by digest, ordered by last use; slot 0 is the base."""

    arrays: dict[str, NDArray[Any]]
    device: Bindable
    slots: dict[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors on the device."""
        return sum(values.nbytes for values in self.arrays.values())

    @property
    def capacity(self) -> int:
        """The maximum number of adapters."""
        return len(next(iter(self.arrays.values()))) - 1


class Stacks:
    """Makes and caches the stack that mixed batches read. Not thread-safe.

    `defaults`: the base's values of parameters that adapters replace, by side input, [1, …].
    `device`: where the tensors are, in onnxruntime's terms. `budget`: their maximum size in bytes,
    unless a single batch needs more.
    `base`: what is bound for the base; if it is not empty, side inputs must not have rank 0.
    `ranked`: see `AdapterBank`.
    """

    def __init__(
        self,
        manifest: Manifest,
        defaults: Arrays,
        device: tuple[str, int],
        budget: int | None,
        base: Bindable,
        *,
        ranked: bool = False,
    ) -> None:
        self._manifest = manifest
        self._device = device
        self._budget = budget
        self._base = base
        self._least_rank = 1 if base.values else 0
        self._targets = manifest.targets
        self._fill = Filler(manifest, defaults, ranked=ranked)
        self._stack: Stack | None = None

    @property
    def nbytes(self) -> int:
        """The size of the stack in bytes."""
        return 0 if self._stack is None else self._stack.nbytes

    def clear(self) -> None:
        """Drop the stack, which no run may be reading."""
        self._stack = None

    def of(
        self, members: Sequence[Resident], busy: Collection[str]
    ) -> tuple[Bindable, Mapping[Resident, int]]:
        """Return tensors of a stack that contains `members`, and their slots.

        The slots of the adapters in `busy`, by digest, are not overwritten, because runs may read
        them. An adapter that another thread starts to use after `busy` was determined has no slot
        yet.
        """
        stack = self._stack
        if not self._fits_into(stack, members, busy):
            stack = self._larger(stack, members)
            self._stack = stack
        assert stack is not None
        for member in members:
            slot = stack.slots.pop(member.digest, None)
            stack.slots[member.digest] = self._place(stack, member, busy) if slot is None else slot
        return stack.device, {member: stack.slots[member.digest] for member in members}

    def _fits_into(
        self, stack: Stack | None, members: Sequence[Resident], busy: Collection[str]
    ) -> bool:
        if stack is None:
            return False
        new = [member for member in members if member.digest not in stack.slots]
        if not new:
            return True
        if self._device[0] != HOST:
            return False
        ranks = self._fill.ranks(new, self._least_rank)
        if any(ranks[t.lora_A] > stack.arrays[t.lora_A].shape[2] for t in self._targets):
            return False
        free = stack.capacity - len(stack.slots)
        if len(new) <= free:
            return True
        wanted = min(2 * stack.capacity, self._most(stack.nbytes // (stack.capacity + 1)))
        if wanted > stack.capacity:
            return False
        idle = sum(digest not in busy for digest in stack.slots)  # the members are in use
        return len(new) <= free + idle

    def _place(self, stack: Stack, member: Resident, busy: Collection[str]) -> int:
        """Write `member` into a free slot, or that of the least recently used idle adapter."""
        taken = set(stack.slots.values())
        free = next((slot for slot in range(1, stack.capacity + 1) if slot not in taken), None)
        if free is None:
            idle = next(digest for digest in stack.slots if digest not in busy)
            free = stack.slots.pop(idle)
        self._fill.write(stack.arrays, free, member)
        return free

    def _larger(self, stack: Stack | None, members: Sequence[Resident]) -> Stack:
        """Make a stack of `members` and, if there is room, of adapters in `stack`."""
        ranks = self._fill.ranks(members, self._least_rank)
        before = 0 if stack is None else stack.capacity
        if stack is not None:
            for target in self._targets:
                held = stack.arrays[target.lora_A].shape[2]
                ranks[target.lora_A] = max(ranks[target.lora_A], held)
        numbers = sum(math.prod(shape) for shape in self._fill.shapes(1, ranks).values())
        slot_bytes = numbers * self._fill.dtype.itemsize
        new = sum(stack is None or member.digest not in stack.slots for member in members)
        wanted = new if stack is None else max(len(stack.slots) + new, before)
        if stack is not None and wanted > before:
            wanted = max(wanted, 2 * before)
        capacity = max(len(members), min(wanted, self._most(slot_bytes)))
        larger = Stack(self._fill.empty(capacity + 1, ranks), Bindable({}))
        self._copy(stack, larger, {member.digest for member in members})
        for member in members:
            if member.digest not in larger.slots:
                larger.slots[member.digest] = len(larger.slots) + 1
                self._fill.write(larger.arrays, larger.slots[member.digest], member)
        larger.device = self._bindable(larger.arrays)
        return larger

    def _copy(self, old: Stack | None, new: Stack, needed: Collection[str]) -> None:
        """Copy the adapters in `needed` and, if there is room, the most recently used others."""
        if old is None:
            return
        room = new.capacity - len(needed)
        others = [digest for digest in old.slots if digest not in needed]
        kept = others[max(0, len(others) - room) :] + [d for d in old.slots if d in needed]
        for slot, digest in enumerate(kept, start=1):
            for name, values in old.arrays.items():
                # Only the rank may be larger: the last axis of A, the second of B without the
                # slots.
                place = tuple(slice(size) for size in values.shape[1:])
                new.arrays[name][slot][place] = values[old.slots[digest]]
            new.slots[digest] = slot

    def _most(self, slot_bytes: int) -> int:
        """The maximum number of slots, without the base's."""
        if self._budget is None:
            return _SLOTS
        return max(1, self._budget // max(slot_bytes, 1) - 1)

    def _bindable(self, arrays: Mapping[str, NDArray[Any]]) -> Bindable:
        return bindable(arrays, self._manifest, self._device, self._base)


def neutral(manifest: Manifest, defaults: Arrays, device: tuple[str, int]) -> Bindable:
    """Every side input of the graph with the base's values; factors are zeros of minimal rank.

    `defaults`: see `Stacks`.
    """
    changes = change_inputs(manifest)
    ranks = {name: t.rank_from(1) for t in manifest.targets for name in t.factors}
    values = {}
    for spec in manifest.side_inputs():
        sizes = {RANK: ranks.get(spec.name, 1)}
        shape = tuple(size if isinstance(size, int) else sizes.get(size, 1) for size in spec.shape)
        numbers = defaults.get(spec.name)
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
