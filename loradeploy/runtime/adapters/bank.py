"""The adapter bank: the names of adapters, and their side inputs in memory.

Registering a name reads nothing: its adapter is read when a run first needs it. If the memory
exceeds the budget, the least recently used adapters are evicted, except those that are in use or
pinned. A few unused blends are kept. Memory is shared by content: two names of equal adapters use
it once, and an adapter that is read again must not have changed. Labels are not part of the
content: each name has the head that its own files declare.

leases.py makes the tensors that runs read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from loradeploy.errors import (
    AdapterError,
    BudgetError,
    UnknownAdapterError,
    UsageError,
    listed_names,
)
from loradeploy.runtime.adapters.block import in_one_block
from loradeploy.runtime.adapters.leases import Lease, Leases
from loradeploy.runtime.adapters.resident import (
    AdapterSpec,
    Arrays,
    Resident,
    blend,
    blend_digest,
    blend_head,
    weights_of,
)
from loradeploy.runtime.memory import return_freed_memory

if TYPE_CHECKING:
    from loradeploy.adapter.heads import Head
    from loradeploy.bundle.manifest import Manifest

# Reads an adapter: returns its side inputs, digest and head.
Read = Callable[[], "tuple[Arrays, str, Head]"]
_MIB: Final = 1 << 20
_LARGE: Final = 1 << 22  # bytes of an adapter; for a smaller one, it is not worth the time
# Number of unused blends that are kept, regardless of the budget: the number of possible weights is
# unlimited, and a blend is quickly computed again from its members.
_IDLE_BLENDS: Final = 8


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


@dataclass(eq=False)
class _Entry:
    """A registered name.

    `read`: reads the adapter. `head`: None until it was read. `digest`: None until it was read, if
    it was not given. `loading`: held by the thread that reads it.
    """

    name: str
    read: Read
    digest: str | None
    head: Head | None = None
    pinned: bool = False
    loading: threading.Lock = field(default_factory=threading.Lock)


class AdapterBank:
    """The adapters of one session. Thread-safe.

    `defaults`: the base's values of parameters that adapters replace, by side input, [1, …].
    `device`, `device_id`: where factors are kept, in onnxruntime's terms.
    `feeds_all`: whether side inputs that an adapter lacks are bound too, with the base's values and
    a rank above 0.
    `fixed`: whether runs copy adapters into their own slots, so that the bank keeps no copies on
    the device.
    `ranked`: whether stacks have the ranks of their adapters, which the operator reads.
    `host_budget`: bytes of adapters in host memory; `device_budget`: bytes of their copies on the
    device, which on the CPU are the stacks of mixed batches. None is no limit. Adapters that are in
    use at the same time may exceed the budget temporarily.
    """

    def __init__(
        self,
        manifest: Manifest,
        defaults: Arrays,
        *,
        device: str = "cpu",
        device_id: int = 0,
        feeds_all: bool = False,
        fixed: bool = False,
        ranked: bool = False,
        host_budget: int | None = None,
        device_budget: int | None = None,
    ) -> None:
        for name, budget in (("host_budget", host_budget), ("device_budget", device_budget)):
            if budget is not None and budget < 1:
                raise UsageError(f"{name} is {budget} bytes: give 1 or more, or None")
        self._manifest = manifest
        self._order = {name: position for position, name in enumerate(manifest.factors)}
        self._host_budget = host_budget
        self._entries: dict[str, _Entry] = {}
        self._residents: dict[str, Resident] = {}  # by digest, in the order of their last use
        self._users: dict[str, list[int]] = {}  # by digest: the threads, once for each use
        self._leaving: set[str] = set()  # digests in use that no name refers to any more
        self._host_bytes = 0
        self._hits = self._misses = self._evictions = 0
        self._changed = threading.Condition()
        self._leases = Leases(
            manifest,
            defaults,
            (device, device_id),
            feeds_all=feeds_all,
            fixed=fixed,
            ranked=ranked,
            budget=device_budget,
            users=self._users,
            changed=self._changed,
        )

    # -- names ---------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        with self._changed:
            return name in self._entries

    def digests(self) -> dict[str, str | None]:
        """All names with the digests of their adapters, or None if the digest is not known yet."""
        with self._changed:
            return {name: entry.digest for name, entry in self._entries.items()}

    def register(
        self, name: str, read: Read, *, digest: str | None = None, replace: bool = False
    ) -> None:
        """Register `name`; `read` is called when a run first needs the adapter.

        Raises:
            UsageError: the name is taken, and `replace` is not given.
        """
        with self._changed:
            if name in self._entries and not replace:
                raise _taken(name)
            self._entries[name] = _Entry(name, read, digest)
            self._drop_unnamed()

    def add(
        self,
        name: str,
        read: Read,
        *,
        replace: bool = False,
    ) -> Resident:
        """Read an adapter now, and return the bank's entry for its name.

        Adding the same adapter again has no effect. Another adapter, or one with another head,
        requires `replace`: running calls complete with the old one, later calls use the new one.

        Raises:
            UsageError: another adapter has this name, and `replace` is not given.
            BudgetError: it is larger than the whole budget.
        """
        arrays, digest, head = read()
        with self._changed:
            there = self._entries.get(name)
        if there is not None and not replace and (there.digest, there.head) != (digest, head):
            # It may be the same one in another format, or not read yet.
            with self._loaded(there) as (present, its_head):
                alike = not head.declared or head == its_head
                if not (alike and present.computes(digest, arrays)):
                    raise _taken(name)
            return present
        arrays = self._in_order(arrays)
        _return_copies(arrays)
        with self._changed:
            there = self._entries.get(name)
            known = there is not None and (there.digest, there.head) == (digest, head)
            if there is not None and not known and not replace:
                raise _taken(name)
            resident = self._admit(Resident(digest, arrays))
            if not known:
                self._entries[name] = _Entry(name, read, digest, head)
                self._drop_unnamed()
        return resident

    def remove(self, name: str) -> None:
        """Remove a name, and wait until the runs that use its adapter have ended.

        Later runs cannot use it.

        Raises:
            UnknownAdapterError: there is no such name.
            UsageError: this thread is itself in the middle of a run with adapters.
        """
        with self._changed:
            entry = self._entries.get(name)
            if entry is None:
                raise self._unknown(name)
            resident = self._residents.get(entry.digest or "")
            # A waiting thread uses no adapters, so that two threads cannot wait for each other.
            busy = any(threading.get_ident() in threads for threads in self._users.values())
            if busy and resident is not None:
                raise UsageError(
                    f"this thread is in the middle of a run with adapters: unload {name!r} after it"
                )
            del self._entries[name]
            self._drop_unnamed()
            if resident is not None and resident.digest in self._leaving:
                self._changed.wait_for(lambda: resident.digest not in self._users)

    def pin(self, name: str, *, pinned: bool = True) -> None:
        """Load an adapter and exempt it from eviction; with `pinned=False`, allow eviction again.

        Raises:
            UnknownAdapterError: there is no such name. BudgetError: as `add`.
        """
        with self._changed:
            entry = self._entries.get(name)
            if entry is None:
                raise self._unknown(name)
            entry.pinned = pinned
            self._evict()
        if pinned:
            with self._loaded(entry):
                pass

    def statistics(self) -> BankStatistics:
        """The current contents, and the counts since the bank was created."""
        with self._leases.locked():
            return BankStatistics(
                registered=len(self._entries),
                resident=len(self._residents),
                host_bytes=self._host_bytes,
                device_bytes=self._leases.nbytes,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
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
        per_row = not (adapters is None or isinstance(adapters, str | Mapping))
        specs: Sequence[AdapterSpec | None]
        specs = adapters if per_row else [adapters]  # type: ignore[assignment,list-item]
        held: list[Resident] = []
        thread = threading.get_ident()
        lease: Lease | None = None
        try:
            found = {
                weights: self._find(weights, held, thread)
                for weights in dict.fromkeys(weights_of(s) for s in specs if s is not None)
            }
            chosen = [(None, None) if s is None else found[weights_of(s)] for s in specs]
            rows, heads = zip(*chosen, strict=True) if chosen else ((), ())
            lease = self._leases.make(rows, heads, per_row)
            yield lease
        finally:
            self._release(held, thread)
            if lease is not None:
                self._leases.end(lease)

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

    def _find(
        self, weights: tuple[tuple[str, float], ...], held: list[Resident], thread: int
    ) -> tuple[Resident, Head]:
        """Return the adapter or blend; mark it and its members as used by `thread`, in `held`."""
        taken = {name: self._take(name, held, thread) for name, _ in weights}
        members = [(taken[name][0], weight) for name, weight in weights]
        if len(members) == 1 and members[0][1] == 1:
            return taken[weights[0][0]]
        head = blend_head({name: own for name, (_, own) in taken.items()})
        digest = blend_digest(members)
        with self._changed:
            made = self._residents.get(digest)
            if made is not None:
                return self._use(made, held, thread), head
        made = blend(members, self._manifest)
        with self._changed:
            return self._use(self._admit(made), held, thread), head

    def _take(self, name: str, held: list[Resident], thread: int) -> tuple[Resident, Head]:
        """Return the adapter `name` and its head, reading it if needed; mark it as used."""
        missed = False
        while True:
            with self._changed:
                entry = self._entries.get(name)
                if entry is None:
                    raise self._unknown(name)
                resident = self._residents.get(entry.digest or "")
                # An equal adapter with another name may have another head.
                if resident is not None and entry.head is not None:
                    self._hits += not missed
                    return self._use(resident, held, thread), entry.head
                self._misses += not missed
                missed = True
            with entry.loading:
                with self._changed:
                    # Another thread may have just read it.
                    there = self._residents.get(entry.digest or "")
                    if there is not None and entry.head is not None:
                        if self._entries.get(name) is not entry:
                            continue  # the name was replaced or removed meanwhile
                        return self._use(there, held, thread), entry.head
                arrays, digest, head = self._read(entry)
                with self._changed:
                    if self._entries.get(name) is not entry:
                        continue
                    entry.digest, entry.head = digest, head
                    resident = self._admit(Resident(digest, arrays))
                    return self._use(resident, held, thread), head

    @contextmanager
    def _loaded(self, entry: _Entry) -> Iterator[tuple[Resident, Head]]:
        """Load the adapter of `entry`; yield it and its head, in use during the context."""
        held: list[Resident] = []
        thread = threading.get_ident()
        try:
            yield self._take(entry.name, held, thread)
        finally:
            self._release(held, thread)

    def _read(self, entry: _Entry) -> tuple[Arrays, str, Head]:
        """Read the adapter of `entry`."""
        arrays, digest, head = entry.read()
        if entry.digest not in (None, digest) or entry.head not in (None, head):
            raise AdapterError(
                f"the adapter {entry.name!r} has changed on disk since it was registered: load it"
                " again with replace=True"
            )
        arrays = self._in_order(arrays)
        _return_copies(arrays)
        return arrays, digest, head

    def _in_order(self, arrays: Arrays) -> Arrays:
        """Copy the arrays into one block, in the order in which the graph reads them."""
        names = sorted(arrays, key=lambda name: self._order.get(name, len(self._order)))
        return in_one_block({name: arrays[name] for name in names})

    def _use(self, resident: Resident, held: list[Resident], thread: int) -> Resident:
        """Mark as used, and as used last. The caller holds `_changed`."""
        self._residents[resident.digest] = self._residents.pop(resident.digest, resident)
        self._users.setdefault(resident.digest, []).append(thread)
        held.append(resident)
        return resident

    def _release(self, held: Sequence[Resident], thread: int) -> None:
        with self._changed:
            for resident in held:
                users = self._users[resident.digest]
                users.remove(thread)
                if not users:
                    del self._users[resident.digest]
                    if resident.digest in self._leaving:
                        self._drop_unnamed()
            self._evict()
            self._changed.notify_all()

    # -- memory; the caller holds `_changed` ---------------------------------------------------

    def _admit(self, resident: Resident) -> Resident:
        """Add an adapter unless an equal one exists; evict others if the budget is exceeded."""
        there = self._residents.get(resident.digest)
        if there is not None:
            return there
        if self._host_budget is not None and resident.nbytes > self._host_budget:
            raise BudgetError(
                f"an adapter takes {resident.nbytes / _MIB:.1f} MiB, the whole host_budget is"
                f" {self._host_budget / _MIB:.1f} MiB: give the session more, or lower its rank"
            )
        self._residents[resident.digest] = resident
        self._host_bytes += resident.nbytes
        self._evict(spare=resident)
        return resident

    def _evict(self, spare: Resident | None = None) -> None:
        """Evict the least recently used: idle blends beyond a few, then what exceeds the budget."""
        blends = [one for one in self._residents.values() if one.parts and one is not spare]
        idle = [one for one in blends if one.digest not in self._users]
        for resident in idle[: max(0, len(idle) - _IDLE_BLENDS)]:
            self._drop(resident)
            self._evictions += 1
        if self._host_budget is None or self._host_bytes <= self._host_budget:
            return
        pinned = {entry.digest for entry in self._entries.values() if entry.pinned}
        for resident in list(self._residents.values()):
            if self._host_bytes <= self._host_budget:
                return
            if resident is spare or resident.digest in self._users or resident.digest in pinned:
                continue
            self._drop(resident)
            self._evictions += 1

    def _drop_unnamed(self) -> None:
        """Remove adapters that no name refers to, and blends of them."""
        named = {entry.digest for entry in self._entries.values()}
        self._leaving.clear()
        for resident in list(self._residents.values()):
            if all(part in named for part in resident.parts or (resident.digest,)):
                continue
            if resident.digest in self._users:
                self._leaving.add(resident.digest)
            else:
                self._drop(resident)

    def _drop(self, resident: Resident) -> None:
        del self._residents[resident.digest]
        self._leases.drop(resident)
        self._host_bytes -= resident.nbytes

    def _unknown(self, name: str) -> UnknownAdapterError:
        known = listed_names(sorted(self._entries))
        return UnknownAdapterError(f"no adapter is loaded as {name!r}; there are: {known}")


def _return_copies(arrays: Arrays) -> None:
    """Return the memory of copies that were made while a large adapter was read.

    The C library would keep it: twice the size of the adapter.
    """
    if sum(values.nbytes for values in arrays.values()) >= _LARGE:
        return_freed_memory()


def _taken(name: str) -> UsageError:
    return UsageError(
        f"another adapter is loaded as {name!r}: unload it first, replace it (replace=True), or"
        " choose another name"
    )
