"""Adapters and blends in host memory: which are in use, and which are evicted.

If the memory exceeds the budget, the least recently used adapters are evicted, except those that
are in use or pinned. A few unused blends are kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from loradeploy.errors import BudgetError

if TYPE_CHECKING:
    from loradeploy.runtime.adapters.leases import Leases
    from loradeploy.runtime.adapters.resident import Entry, Resident

_MIB: Final = 1 << 20
# Number of unused blends that are kept, regardless of the budget: the number of possible weights is
# unlimited, and a blend is quickly computed again from its members.
_IDLE_BLENDS: Final = 8


@dataclass(frozen=True, eq=False)
class Use:
    """The adapters that one lease keeps in memory. `thread`: the thread that made the lease."""

    residents: list[Resident] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)


class HostMemory:
    """The adapters and blends of a bank in host memory. The caller holds the bank's lock.

    `budget`: bytes of adapters; None is no limit. `entries`: the bank's names.
    `users`: the uses of an adapter, by its digest.
    `leases`: keep copies of the adapters on the device.
    """

    def __init__(
        self,
        budget: int | None,
        entries: Mapping[str, Entry],
        users: dict[str, set[Use]],
        leases: Leases,
    ) -> None:
        self.budget = budget
        self._entries = entries
        self._users = users
        self._leases = leases
        self._by_digest: OrderedDict[str, Resident] = OrderedDict()  # by their last use
        self._leaving: set[str] = set()  # digests in use that no name refers to any more
        self.nbytes = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._by_digest)

    def __iter__(self) -> Iterator[Resident]:
        return iter(self._by_digest.values())

    def __getitem__(self, digest: str) -> Resident:
        return self._by_digest[digest]

    def get(self, digest: str | None) -> Resident | None:
        """The adapter or blend with this digest, if it is in memory."""
        return None if digest is None else self._by_digest.get(digest)

    def is_leaving(self, resident: Resident) -> bool:
        """Whether it is only in memory until the runs that use it have ended."""
        return resident.digest in self._leaving

    def use(self, resident: Resident, use: Use) -> Resident:
        """Mark `resident` as used, and as used last."""
        use.residents.append(resident)  # first, so that a release finds it
        self._users.setdefault(resident.digest, set()).add(use)
        self._by_digest.move_to_end(resident.digest)
        return resident

    def release(self, use: Use) -> None:
        """End a use; remove what was only in memory for it, or exceeds the budget.

        A second call has no effect.
        """
        for resident in use.residents:
            uses = self._users.get(resident.digest, set())
            uses.discard(use)
            if not uses:
                self._users.pop(resident.digest, None)
                if resident.digest in self._leaving:
                    self.drop_unnamed()
        self.evict()

    def admit(self, resident: Resident) -> Resident:
        """Add an adapter unless an equal one exists; evict others if the budget is exceeded.

        Raises:
            BudgetError: it is larger than the whole budget.
        """
        there = self._by_digest.get(resident.digest)
        if there is not None:
            return there
        if self.budget is not None and resident.nbytes > self.budget:
            raise BudgetError(
                f"an adapter takes {resident.nbytes / _MIB:.1f} MiB, the whole host_budget is"
                f" {self.budget / _MIB:.1f} MiB: give the session more, or lower its rank"
            )
        size = resident.nbytes
        self._by_digest[resident.digest] = resident
        self.nbytes += size
        self.evict(spare=resident)
        return resident

    def evict(self, spare: Resident | None = None) -> None:
        """Evict the least recently used: idle blends beyond a few, then what exceeds the budget."""
        blends = [one for one in self if one.parts and one is not spare]
        idle = [one for one in blends if one.digest not in self._users]
        for resident in idle[: max(0, len(idle) - _IDLE_BLENDS)]:
            self._drop(resident)
            self.evictions += 1
        if self.budget is None or self.nbytes <= self.budget:
            return
        pinned = {entry.digest for entry in self._entries.values() if entry.pinned}
        for resident in list(self):
            if self.nbytes <= self.budget:
                return
            if resident is spare or resident.digest in self._users or resident.digest in pinned:
                continue
            self._drop(resident)
            self.evictions += 1

    def drop_unnamed(self) -> None:
        """Remove adapters that no name refers to, and blends of them."""
        named = {entry.digest for entry in self._entries.values()}
        self._leaving.clear()
        for resident in list(self):
            if all(part in named for part in resident.parts or (resident.digest,)):
                continue
            if resident.digest in self._users:
                self._leaving.add(resident.digest)
            else:
                self._drop(resident)

    def _drop(self, resident: Resident) -> None:
        size = resident.nbytes
        del self._by_digest[resident.digest]
        self.nbytes -= size
        self._leases.drop(resident)
