"""The adapter bank: the names of adapters, and their side inputs in memory.

Registering a name reads nothing: its adapter is read when a run first needs it. Memory is shared by
content: two names of equal adapters use it once, and an adapter that is read again must not have
changed. Labels are not part of the content: each name has the head that its own files declare.

host_memory.py decides what stays in memory, leases.py makes the tensors that runs read.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loradeploy.errors import AdapterError, UnknownAdapterError, UsageError, listed_names, shown
from loradeploy.given_numbers import checked_count
from loradeploy.runtime.adapters.block import in_one_block
from loradeploy.runtime.adapters.host_memory import HostMemory, Use
from loradeploy.runtime.adapters.leases import Lease, Leases
from loradeploy.runtime.adapters.resident import (
    AdapterSpec,
    Entry,
    FittedAdapter,
    Read,
    Resident,
    SideInputs,
    blend,
    blend_digest,
    blend_head,
    weights_of,
)
from loradeploy.runtime.lifetime import wait_until
from loradeploy.runtime.memory import return_freed_memory

if TYPE_CHECKING:
    from loradeploy.adapter.heads import Head

_LARGE: Final = 1 << 22  # bytes of an adapter; for a smaller one, it is not worth the time


@dataclass(frozen=True)
class BankStatistics:
    """The contents of a bank and counts of its operations.

    `registered`: names. `resident`: adapters and blends in host memory, of `host_bytes` in total.
    `device_bytes`: bytes of copies on the device and of stacks. `hits`, `misses`: uses of an
    adapter that was in memory, or was not. `evictions`: adapters and blends that were removed to
    free memory.
    """

    registered: int
    resident: int
    host_bytes: int
    device_bytes: int
    hits: int
    misses: int
    evictions: int


class AdapterBank:
    """The adapters of one session. Thread-safe.

    `host_budget`: bytes of adapters in host memory; `device_budget`: bytes of their copies on the
    device, which on the CPU are the stacks of mixed batches. None is no limit. Adapters that are in
    use at the same time may exceed the budget temporarily.
    """

    def __init__(
        self,
        sides: SideInputs,
        *,
        host_budget: int | None = None,
        device_budget: int | None = None,
    ) -> None:
        if host_budget is not None:
            host_budget = checked_count("host_budget", host_budget)
        if device_budget is not None:
            device_budget = checked_count("device_budget", device_budget)
        self._manifest = sides.manifest
        self._order = {name: position for position, name in enumerate(sides.manifest.factors)}
        self._entries: dict[str, Entry] = {}
        self._users: dict[str, set[Use]] = {}  # see `HostMemory`
        self._hits = self._misses = 0
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._leases = Leases(sides, device_budget, self._users, self._lock)
        self._memory = HostMemory(host_budget, self._entries, self._users, self._leases)

    # -- names ---------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return name in self._entries

    def digests(self) -> dict[str, str | None]:
        """All names with the digests of their adapters, or None if the digest is not known yet."""
        with self._lock:
            return {name: entry.digest for name, entry in self._entries.items()}

    def register(
        self, name: str, read: Read, *, digest: str | None = None, replace: bool = False
    ) -> None:
        """Register `name`; `read` is called when a run first needs the adapter.

        Raises:
            UsageError: the name is taken, and `replace` is not given.
        """
        with self._lock:
            if name in self._entries and not replace:
                raise _taken(name)
            self._entries[name] = Entry(name, read, digest)
            self._memory.drop_unnamed()

    def add(self, name: str, read: Read, *, replace: bool = False) -> Resident:
        """Read an adapter now, and return the bank's entry for its name.

        Adding the same adapter again has no effect. Another adapter, or one with another head,
        requires `replace`: running calls complete with the old one, later calls use the new one.

        Raises:
            UsageError: another adapter has this name, and `replace` is not given.
            BudgetError: it is larger than the whole budget.
        """
        adapter = read()
        with self._lock:
            there = self._entries.get(name)
        if there is not None and not replace and not there.holds(adapter):
            # It may be the same one in another format, or not read yet.
            with self._loaded(there) as (present, its_head):
                alike = not adapter.head.declared or adapter.head == its_head
                if not (alike and present.computes(adapter)):
                    raise _taken(name)
            return present
        adapter = self._packed(adapter)
        _return_copies(adapter)
        with self._lock:
            there = self._entries.get(name)
            known = there is not None and there.holds(adapter)
            if there is not None and not known and not replace:
                raise _taken(name)
            resident = self._memory.admit(Resident(adapter.digest, adapter.arrays))
            if not known:
                self._entries[name] = Entry(name, read, adapter.digest, adapter.head)
                self._memory.drop_unnamed()
        return resident

    def remove(self, name: str) -> None:
        """Remove a name, and wait until the runs that use its adapter have ended.

        Later runs cannot use it.

        Raises:
            UnknownAdapterError: there is no such name.
            UsageError: this thread is itself in the middle of a run with adapters.
        """
        with self._lock:
            entry = self._known(name)
            resident = self._memory.get(entry.digest)
            # A waiting thread uses no adapters, so that two threads cannot wait for each other.
            own = threading.get_ident()
            busy = any(use.thread == own for uses in self._users.values() for use in uses)
            if busy and resident is not None:
                raise UsageError(
                    f"this thread is in the middle of a run with adapters: unload {name!r} after it"
                )
            del self._entries[name]
            self._memory.drop_unnamed()
            if resident is not None and self._memory.is_leaving(resident):
                wait_until(self._changed, lambda: resident.digest not in self._users)

    def pin(self, name: str, *, pinned: bool = True) -> None:
        """Load an adapter and exempt it from eviction; with `pinned=False`, allow eviction again.

        Raises:
            UnknownAdapterError: there is no such name. BudgetError: as `add`.
        """
        with self._lock:
            entry = self._known(name)
            if not pinned:
                entry.pinned = False
                self._memory.evict()
                return
        with self._loaded(entry), self._lock:
            # It may have been replaced meanwhile; what cannot be read is not pinned.
            self._entries.get(name, entry).pinned = True

    def statistics(self) -> BankStatistics:
        """The current contents, and the counts since the bank was created."""
        with self._leases.stacking, self._lock:
            return BankStatistics(
                registered=len(self._entries),
                resident=len(self._memory),
                host_bytes=self._memory.nbytes,
                device_bytes=self._leases.nbytes,
                hits=self._hits,
                misses=self._misses,
                evictions=self._memory.evictions,
            )

    # -- runs ----------------------------------------------------------------------------------

    @contextmanager
    def lease(self, adapters: AdapterSpec | Sequence[AdapterSpec | None] | None) -> Iterator[Lease]:
        """Yield what runs with `adapters` bind; it does not change during the context.

        Raises:
            UnknownAdapterError: a name that is not in the bank.
            UsageError: a blend that cannot be made.
            BudgetError: an adapter that is larger than the whole budget.
        """
        per_row = True
        if adapters is None or isinstance(adapters, str | Mapping):
            per_row, adapters = False, (adapters,)
        use = Use()
        lease: Lease | None = None
        try:
            found = {
                weights: self._find(weights, use)
                for weights in dict.fromkeys(weights_of(s) for s in adapters if s is not None)
            }
            chosen = [(None, None) if s is None else found[weights_of(s)] for s in adapters]
            rows, heads = zip(*chosen, strict=True) if chosen else ((), ())
            lease = self._leases.make(rows, heads, per_row)
            yield lease
        finally:
            try:
                self._end(use, lease)
            except KeyboardInterrupt:  # see lifetime.py
                self._end(use, lease)
                raise

    def join(self, rows: Sequence[tuple[Lease, int]], instead: Lease | None) -> Lease:
        """Make a lease of rows of other leases, as the rows of one batch, until `end_lease`.

        The other leases must last longer. `instead`: the caller's earlier lease, which no run reads
        any more; its memory may be reused.
        """
        residents = tuple(lease.rows[row] for lease, row in rows)
        heads = tuple(lease.heads[row] for lease, row in rows)
        return self._leases.make(residents, heads, per_row=True, instead=instead)

    def end_lease(self, lease: Lease) -> None:
        """End a lease that `join` made."""
        self._leases.end(lease)

    def _find(self, weights: tuple[tuple[str, float], ...], use: Use) -> tuple[Resident, Head]:
        """Return the adapter or blend and its head; mark it and its members as used."""
        taken = {name: self._take(name, use) for name, _ in weights}
        members = [(taken[name][0], weight) for name, weight in weights]
        if len(members) == 1 and members[0][1] == 1:
            return taken[weights[0][0]]
        head = blend_head({name: own for name, (_, own) in taken.items()})
        digest = blend_digest(members)
        with self._lock:
            made = self._memory.get(digest)
            if made is not None:
                return self._memory.use(made, use), head
        made = blend(members, self._manifest)
        with self._lock:
            return self._memory.use(self._memory.admit(made), use), head

    def _take(self, name: str, use: Use) -> tuple[Resident, Head]:
        """Return the adapter `name` and its head, reading it if needed; mark it as used."""
        counted = False
        while True:
            with self._lock:
                entry = self._known(name)
                found = self._in_memory(entry, use)
                if not counted:
                    self._hits += found is not None
                    self._misses += found is None
                    counted = True
                if found is not None:
                    return found
            with entry.loading:
                with self._lock:
                    if self._entries.get(name) is not entry:
                        continue  # the name was replaced or removed meanwhile
                    found = self._in_memory(entry, use)
                    if found is not None:
                        return found  # another thread has just read it
                adapter = self._read(entry)
                with self._lock:
                    if self._entries.get(name) is not entry:
                        continue
                    entry.digest, entry.head = adapter.digest, adapter.head
                    resident = self._memory.admit(Resident(adapter.digest, adapter.arrays))
                    return self._memory.use(resident, use), adapter.head

    def _in_memory(self, entry: Entry, use: Use) -> tuple[Resident, Head] | None:
        """Return the adapter of `entry` and its head, marked as used, if they were read.

        The caller holds the lock.
        """
        resident = self._memory.get(entry.digest)
        # An equal adapter with another name may have another head.
        if resident is None or entry.head is None:
            return None
        return self._memory.use(resident, use), entry.head

    @contextmanager
    def _loaded(self, entry: Entry) -> Iterator[tuple[Resident, Head]]:
        """Load the adapter of `entry`; yield it and its head, in use during the context."""
        use = Use()
        try:
            yield self._take(entry.name, use)
        finally:
            try:
                self._end(use, None)
            except KeyboardInterrupt:
                self._end(use, None)
                raise

    def _read(self, entry: Entry) -> FittedAdapter:
        """Read the adapter of `entry`."""
        adapter = entry.read()
        if entry.digest not in (None, adapter.digest) or entry.head not in (None, adapter.head):
            raise AdapterError(
                f"the adapter {entry.name!r} has changed on disk since it was registered: load it"
                " again with replace=True"
            )
        adapter = self._packed(adapter)
        _return_copies(adapter)
        return adapter

    def _packed(self, adapter: FittedAdapter) -> FittedAdapter:
        """Copy the arrays into one block, in the order in which the graph reads them."""
        last = len(self._order)
        names = sorted(adapter.arrays, key=lambda name: self._order.get(name, last))
        arrays = in_one_block({name: adapter.arrays[name] for name in names})
        return dataclasses.replace(adapter, arrays=arrays)

    def _end(self, use: Use, lease: Lease | None) -> None:
        with self._lock:
            self._memory.release(use)
            self._changed.notify_all()
        if lease is not None:
            self._leases.end(lease)

    def _known(self, name: str) -> Entry:
        if name not in self._entries:
            known = listed_names(sorted(self._entries))
            raise UnknownAdapterError(f"no adapter is loaded as {shown(name)}; there are: {known}")
        return self._entries[name]


def _return_copies(adapter: FittedAdapter) -> None:
    """Return the memory of copies that were made while a large adapter was read.

    The C library would keep it: twice the size of the adapter.
    """
    if sum(values.nbytes for values in adapter.arrays.values()) >= _LARGE:
        return_freed_memory()


def _taken(name: str) -> UsageError:
    return UsageError(
        f"another adapter is loaded as {name!r}: unload it first, replace it (replace=True), or"
        " choose another name"
    )
