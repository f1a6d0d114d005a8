"""Stack side inputs in the order of a batch's rows, for graphs with a slot for each row.

When the rows of a batch change, a stack whose last lease has ended is reused, and only the changed
slots are written. While a lease lasts, its stack does not change, and other leases share it whose
rows are side by side in it: when the first or the last texts of a batch end, nothing is written. On
a device other than the host, a stack is made again for any other rows, also for fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from loradeploy.runtime.adapters.resident import Bindable, Resident, used

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.runtime.adapters.filling import Filler

# Number of unused stacks that are kept: of the last batch, and of prompts read beside it.
_IDLE: Final = 2
# Number of a stack's views that are kept; a batch that shrinks to one row has one for each size.
_VIEWS: Final = 16
# An unused stack is not reused if it has more than this many times the required memory.
_LARGER: Final = 2


@dataclass(eq=False)
class RowStack:
    """A stack with one slot for each row.

    `arrays`: the tensors on the host; empty if the bound values are copies on the device. `ranks`:
    the rank of each target module. `rows`: the digest in each slot, None for the base. `capacity`:
    the number of slots. `nbytes`: the size of the tensors. `readers`: the leases that read it,
    which the caller of `take` adds. `views`: what runs bind, by first slot and number of rows.
    """

    arrays: Mapping[str, NDArray[Any]]
    ranks: Mapping[str, int]
    rows: list[str | None]
    capacity: int
    nbytes: int
    readers: WeakSet[object] = field(default_factory=WeakSet)
    views: dict[tuple[int, int], Bindable] = field(default_factory=dict)


class RowStacks:
    """Makes, reuses and caches stacks. Not thread-safe.

    `bind`: converts arrays to values that runs can bind. `on_host`: whether these share the arrays'
    memory, which may then be written later. `least_rank`, `budget`: see `Stacks`.
    """

    def __init__(
        self,
        fill: Filler,
        bind: Callable[[Mapping[str, NDArray[Any]]], Bindable],
        *,
        on_host: bool,
        least_rank: int,
        budget: int | None,
    ) -> None:
        self._fill, self._bind = fill, bind
        self._on_host, self._least_rank, self._budget = on_host, least_rank, budget
        self._stacks: list[RowStack] = []  # in the order of their last use

    @property
    def nbytes(self) -> int:
        """The bytes of all stacks."""
        return sum(stack.nbytes for stack in self._stacks)

    def take(
        self, rows: Sequence[Resident | None], instead: RowStack | None = None
    ) -> tuple[RowStack, Bindable]:
        """Return a stack that has `rows` side by side, and what to bind; release it with `leave`.

        `instead`: the stack of a lease that has not ended, but is not read any more.
        """
        key = [None if resident is None else resident.digest for resident in rows]
        found = ((own, first) for own in self._stacks if (first := self._place(own, key)) >= 0)
        stack, first = next(found, (None, 0))
        if stack is None:
            stack = self._changed(rows, key, instead) or self._new(rows, key)
        view = stack.views.pop((first, len(rows)), None)
        if view is None:
            end = first + len(rows)
            view = self._bind({name: values[first:end] for name, values in stack.arrays.items()})
            if not self._on_host:  # what is bound is a copy
                stack.arrays = {}
        stack.views[first, len(rows)] = view  # in the order of their last use
        if len(stack.views) > _VIEWS:
            stack.views.pop(next(iter(stack.views)))
        if stack in self._stacks:
            self._stacks.remove(stack)
        self._stacks.append(stack)
        return stack, view

    def leave(self, stack: RowStack, reader: object) -> None:
        """Release `stack` for a lease that has ended; a second call has no effect."""
        stack.readers.discard(reader)
        self._trim(0)

    def _place(self, stack: RowStack, key: list[str | None]) -> int:
        """The first slot from which the rows `key` can be read without changes, or -1.

        On the host, some of its rows are a view; on a device they would be another copy.
        """
        if not self._on_host:
            return 0 if stack.rows == key else -1
        last = len(stack.rows) - len(key)
        places = (at for at in range(last + 1) if stack.rows[at : at + len(key)] == key)
        return next(places, -1)

    def _changed(
        self, rows: Sequence[Resident | None], key: list[str | None], instead: RowStack | None
    ) -> RowStack | None:
        """Rewrite the unused stack with the fewest differences to `rows`; None if none fits."""
        stack = self._fits_into(rows, key, instead)
        if stack is None:
            return None
        self._stacks.remove(stack)  # stays removed if a write fails
        for slot, (resident, digest) in enumerate(zip(rows, key, strict=True)):
            if slot >= len(stack.rows):
                self._fill.write(stack.arrays, slot, resident)
                stack.rows.append(digest)
            elif stack.rows[slot] != digest:
                self._fill.write(stack.arrays, slot, resident)
                stack.rows[slot] = digest
        return stack

    def _fits_into(
        self, rows: Sequence[Resident | None], key: list[str | None], instead: RowStack | None
    ) -> RowStack | None:
        """The unused stack that `rows` fit into with the fewest differences; None if none fits."""
        if not self._on_host:
            return None
        ranks = self._fill.ranks(used(rows), self._least_rank)
        needed = self._fill.slot_bytes(ranks)
        fitting = [
            stack
            for stack in self._stacks
            if len(stack.readers) == (stack is instead)
            and stack.capacity >= len(rows)
            and all(rank <= stack.ranks[name] for name, rank in ranks.items())
            and stack.nbytes <= _LARGER * needed * stack.capacity
        ]

        def differences(stack: RowStack) -> int:
            others = sum(there != own for there, own in zip(stack.rows, key, strict=False))
            return others + max(0, len(key) - len(stack.rows))

        return min(fitting, key=differences, default=None)

    def _new(self, rows: Sequence[Resident | None], key: list[str | None]) -> RowStack:
        ranks = self._fill.ranks(used(rows), self._least_rank)
        each = self._fill.slot_bytes(ranks)
        capacity = len(rows)
        if self._on_host:  # for later rows; unwritten pages take no memory
            capacity = 1 << (len(rows) - 1).bit_length()
            if self._budget is not None and capacity * each > self._budget:
                capacity = len(rows)
        self._trim(capacity * each)
        arrays = self._fill.unfilled(capacity, ranks)
        for slot, resident in enumerate(rows):
            self._fill.write(arrays, slot, resident)
        return RowStack(arrays, ranks, key, capacity, capacity * each)

    def _trim(self, more: int) -> None:
        """Drop unused stacks beyond a few, or until `more` bytes fit into the budget."""
        idle = [stack for stack in self._stacks if not stack.readers]
        kept = _IDLE - (more > 0)
        while idle and (
            len(idle) > kept or (self._budget is not None and self.nbytes + more > self._budget)
        ):
            self._stacks.remove(idle.pop(0))
