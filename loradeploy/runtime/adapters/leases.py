"""Leases: the tensors that runs read, of single adapters or of stacks, on the device.

An adapter that all rows of a batch use is bound directly: swapping it for another resident one
copies nothing. A batch of different adapters reads a stack of several (stacks.py).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from loradeploy.bundle.names import ROWS
from loradeploy.runtime.adapters.filling import Filler
from loradeploy.runtime.adapters.resident import Arrays, Bindable, Resident, SideInputs, used
from loradeploy.runtime.adapters.row_stacks import RowStack, RowStacks
from loradeploy.runtime.adapters.stacks import HOST, Stacks, bindable, neutral

if TYPE_CHECKING:
    from loradeploy.adapter.heads import Head


@dataclass(frozen=True, eq=False)
class Lease:
    """The adapters of the rows of a run, kept in the bank until the lease ends.

    `rows`: the adapter of each row, None for the base; a single entry if all rows use the same.
    `heads`: the head of each of `rows`, None for the base.
    `per_row`: whether `rows` has an entry for each row.
    `device`: the side inputs to bind.
    `adapter_ids`: int64 [rows], the slot of each row; None if all rows use slot 0.
    `stacked`: whether it reads a stack of several adapters. `stack`: the stack, in the layout with
    a slot for each row.
    """

    rows: tuple[Resident | None, ...]
    heads: tuple[Head | None, ...]
    per_row: bool
    device: Bindable
    adapter_ids: onnxruntime.OrtValue | None = None
    stacked: bool = False
    stack: RowStack | None = None


class Leases:
    """Makes leases, and keeps the copies on the device that they read.

    `budget`: bytes of the copies and the stacks; None is no limit. `users`: the digests in use,
    guarded by `changed`, the bank's lock.
    """

    def __init__(
        self,
        sides: SideInputs,
        budget: int | None,
        users: Mapping[str, object],
        changed: threading.Condition,
    ) -> None:
        self._manifest, self._device, self._fixed = sides.manifest, sides.device, sides.fixed
        self._budget = budget
        # Without `feeds_all`, the defaults in the graph are the base.
        base = neutral(sides) if sides.feeds_all else Bindable({})
        self._base = base
        self._bound: dict[Resident, Bindable] = {}  # in the order of their last use
        # Without `self`, whose cycle would keep a closed session's graph in memory.
        own = weakref.ref(self)

        def move(resident: Resident, arrays: Arrays, *, unless_used: bool = False) -> bool:
            leases = own()
            assert leases is not None, "the stacks are used by the leases alone"
            return leases._move(resident, arrays, unless_used=unless_used)

        self._stacks = Stacks(sides, budget, self._base, move)
        self._rows = RowStacks(
            Filler(sides.manifest, sides.defaults),
            lambda arrays: bindable(arrays, sides.manifest, sides.device, base),
            on_host=sides.device[0] == HOST,
            least_rank=1 if self._base.values else 0,
            budget=budget,
        )
        self._stacked = 0  # leases that read a stack
        self._users, self._changed = users, changed
        self._stacking = threading.Lock()  # acquired before _changed, never inside it

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Acquire the lock of the stacks, then the bank's."""
        with self._stacking, self._changed:
            yield

    @property
    def nbytes(self) -> int:
        """The bytes of copies on the device and of stacks. The caller holds both locks.

        On the host, copies are views and are not counted.
        """
        copies = () if self._device[0] == HOST else self._bound
        stacks = self._stacks.nbytes + self._rows.nbytes
        return sum(resident.nbytes for resident in copies) + stacks

    def make(
        self,
        rows: tuple[Resident | None, ...],
        heads: tuple[Head | None, ...],
        per_row: bool,
        instead: Lease | None = None,
    ) -> Lease:
        """Make a lease of adapters that the caller keeps in use until `end`.

        `instead`: see `AdapterBank.join`.
        """
        members = used(rows)
        if not members:
            return Lease(rows, heads, per_row, self._base)
        if self._fixed:
            mixed = len(members) > 1 or None in rows
            with self._stacking:
                self._stacked += mixed
            return Lease(rows, heads, per_row, self._base, stacked=mixed)
        if len(members) == 1 and None not in rows:
            return Lease(rows, heads, per_row, self._bind(members[0]))
        with self._stacking:
            if self._manifest.layout == ROWS:
                stack, device = self._rows.take(rows, None if instead is None else instead.stack)
                self._stacked += 1
                return Lease(rows, heads, per_row, device, stacked=True, stack=stack)
            with self._changed:
                busy = frozenset(self._users)
            device, slot_of = self._stacks.of(members, busy, base=None in rows)
            self._stacked += 1
        slots = [slot_of[None if resident is None else resident.digest] for resident in rows]
        adapter_ids = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(slots, np.int64))
        return Lease(rows, heads, per_row, device, adapter_ids, stacked=True)

    def end(self, lease: Lease) -> None:
        """End a lease, whose adapters are no longer in use by it."""
        if lease.stacked:
            with self.locked():
                self._stacked -= 1
                if lease.stack is not None:
                    self._rows.leave(lease.stack)
                self._trim()

    def drop(self, resident: Resident) -> None:
        """Release the copy of an adapter that is not in use. The caller holds `changed`."""
        self._bound.pop(resident, None)
        self._stacks.drop(resident)

    def _move(self, resident: Resident, arrays: Arrays, *, unless_used: bool = False) -> bool:
        """See `Move`. Leases that were made before keep reading the previous arrays."""
        with self._changed:
            if unless_used and resident.digest in self._users:
                return False
            resident.host = arrays
            self._bound.pop(resident, None)
            return True

    def _bind(self, resident: Resident) -> Bindable:
        """The side inputs on the device of an adapter that is in use."""
        while True:
            with self._changed:
                there = self._bound.pop(resident, None)
                if there is not None:
                    self._bound[resident] = there
                    return there
                host = resident.host
            made = bindable(host, self._manifest, self._device, self._base)
            with self.locked():
                if resident.host is not host:  # the previous arrays must not stay in memory
                    continue
                made = self._bound.pop(resident, made)
                self._bound[resident] = made
                self._trim()
            return made

    def _trim(self) -> None:
        """Release unused copies on the device beyond the budget. The caller holds both locks."""
        budget = self._budget
        for idle in [other for other in self._bound if other.digest not in self._users]:
            if budget is None or self.nbytes <= budget:
                return
            del self._bound[idle]
        if budget is not None and not self._stacked and self._stacks.nbytes > budget:
            self._stacks.clear()
