"""Leases: the tensors that runs read, of single adapters or of stacks, on the device.

An adapter that all rows of a batch use is bound directly: swapping it for another resident one
copies nothing. A batch of different adapters reads a stack of several (stacks.py).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakSet

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
    guarded by `lock`, the bank's. `stacking`: the lock of the stacks, acquired before the bank's.
    """

    def __init__(
        self,
        sides: SideInputs,
        budget: int | None,
        users: Mapping[str, object],
        lock: threading.RLock,
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
        self._stacked: WeakSet[Lease] = WeakSet()  # leases that read the stack of slots
        self._users, self._lock = users, lock
        self.stacking = threading.Lock()

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
            return Lease(rows, heads, per_row, self._base, stacked=len(members) > 1 or None in rows)
        if len(members) == 1 and None not in rows:
            return Lease(rows, heads, per_row, self._bind(members[0]))
        with self.stacking:
            if self._manifest.layout == ROWS:
                stack, device = self._rows.take(rows, None if instead is None else instead.stack)
                lease = Lease(rows, heads, per_row, device, stacked=True, stack=stack)
                stack.readers.add(lease)
            else:
                with self._lock:
                    busy = frozenset(self._users)
                device, slot_of = self._stacks.of(members, busy, base=None in rows)
                slots = [slot_of[None if one is None else one.digest] for one in rows]
                adapter_ids = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(slots, np.int64))
                lease = Lease(rows, heads, per_row, device, adapter_ids, stacked=True)
                self._stacked.add(lease)
        return lease

    def end(self, lease: Lease) -> None:
        """End a lease, whose adapters are no longer in use by it; a second call has no effect."""
        if lease.stacked:
            with self.stacking, self._lock:
                if lease.stack is not None:
                    self._rows.leave(lease.stack, lease)
                self._stacked.discard(lease)
                self._trim()

    def drop(self, resident: Resident) -> None:
        """Release the copy of an adapter that is not in use. The caller holds the bank's lock."""
        self._bound.pop(resident, None)
        self._stacks.drop(resident)

    def _move(self, resident: Resident, arrays: Arrays, *, unless_used: bool = False) -> bool:
        """See `Move`. Leases that were made before keep reading the previous arrays."""
        with self._lock:
            if unless_used and resident.digest in self._users:
                return False
            resident.host = arrays
            self._bound.pop(resident, None)
            return True

    def _bind(self, resident: Resident) -> Bindable:
        """The side inputs on the device of an adapter that is in use."""
        while True:
            with self._lock:
                there = self._bound.pop(resident, None)
                if there is not None:
                    self._bound[resident] = there
                    return there
                host = resident.host
            made = bindable(host, self._manifest, self._device, self._base)
            with self.stacking, self._lock:
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
