"""Who is next: scopes take turns, and in a scope its adapters, by the work that they ask for.

Fair queueing by start times (FQS, Greenberg and Madras 1992), twice: among scopes, and in each
scope among its adapters. A flow's clock goes on by the cost of each item it is served, and the
waiting flow with the earliest clock is next. `now` goes on by the cost of each item divided by the
number of flows that wait, as the clock of each would if all were served at once.

A flow that was idle begins at `now`, so that nobody saves turns up, or at its own clock where that
is later: nobody comes back without a debt. Invariant: `now` grows with every item, so a flow that
waits is served at last, however many others begin again, and a debt ends. What is kept of an idle
flow is its debt alone: one whose clock is `now` or earlier is forgotten.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


@dataclass(eq=False)
class _Flow(Generic[_Item]):
    """What waits of one adapter in one scope, with what it costs."""

    clock: float
    items: list[tuple[_Item, float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)


@dataclass(eq=False)
class _Scope(Generic[_Item]):
    """What waits in one scope, by adapter. `now`: where an adapter that was idle begins."""

    clock: float
    now: float = 0.0
    flows: dict[Hashable, _Flow[_Item]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.flows.values()))


class FairQueue(Generic[_Item]):
    """Items by scope and adapter. Its user calls it from one thread at a time."""

    def __init__(self) -> None:
        self._scopes: dict[Hashable, _Scope[_Item]] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._scopes.values()))

    def __iter__(self) -> Iterator[_Item]:
        for scope in self._scopes.values():
            for flow in scope.flows.values():
                for item, _ in flow.items:
                    yield item

    def push(self, item: _Item, scope: Hashable, adapter: Hashable, cost: float) -> None:
        """Have `item` wait behind those of its scope and adapter. `cost`: the work it asks for."""
        own = self._scopes.setdefault(scope, _Scope(self._now))
        flow = own.flows.setdefault(adapter, _Flow(own.now))
        if not len(own):
            own.clock = max(own.clock, self._now)
        if not flow.items:
            flow.clock = max(flow.clock, own.now)
        flow.items.append((item, cost))

    def pop(self) -> _Item:
        """The next item."""
        scopes = [one for one in self._scopes.values() if len(one)]
        scope = min(scopes, key=lambda one: one.clock)
        flows = [one for one in scope.flows.values() if len(one)]
        flow = min(flows, key=lambda one: one.clock)
        item, cost = flow.items.pop(0)
        self._now = max(self._now, scope.clock) + cost / len(scopes)
        scope.now = max(scope.now, flow.clock) + cost / len(flows)
        scope.clock += cost
        flow.clock += cost
        self._forget()
        return item

    def remove(self, item: _Item) -> bool:
        """Let go of an item; False where it does not wait."""
        for scope in self._scopes.values():
            for flow in scope.flows.values():
                for at, (waiting, _) in enumerate(flow.items):
                    if waiting is item:
                        del flow.items[at]
                        return True
        return False

    def shed(self, scope: Hashable) -> _Item | None:
        """The newest item of the scope that most wait of, if it has more than `scope` and one.

        It is let go of: the queue is full, and `scope` has less than its share.
        """
        own = self._scopes.get(scope)
        most = max(self._scopes.values(), key=len, default=None)
        if most is None or most is own or len(most) <= (0 if own is None else len(own)) + 1:
            return None
        flow = max(most.flows.values(), key=len)
        return flow.items.pop()[0]

    def _forget(self) -> None:
        """Let go of flows that are idle and without a debt."""
        for name, scope in list(self._scopes.items()):
            for adapter, flow in list(scope.flows.items()):
                if not flow.items and flow.clock <= scope.now:
                    del scope.flows[adapter]
            if not len(scope) and scope.clock <= self._now:
                del self._scopes[name]
