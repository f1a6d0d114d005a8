"""Choose the next request fairly: scopes take turns, and so do adapters in a scope, by cost.

Fair queueing by start times (FQS, Greenberg and Madras 1992), at two levels: among scopes, and
among the adapters of each scope. A flow's clock advances by the cost of each item that is served,
and the waiting flow with the earliest clock is next. `now` advances by the cost of each item
divided by the number of waiting flows, as each flow's clock would if all were served
simultaneously.

A flow that was idle starts at `now`, so that idle time earns no credit, or at its own clock if that
is later, so that its debt remains. Invariant: `now` advances with every item, so a waiting flow is
eventually served, however many others become active, and every debt ends. Only the debt of an idle
flow is stored: a flow whose clock is at most `now` is removed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


@dataclass(eq=False)
class _Flow(Generic[_Item]):
    """The waiting items of one adapter in one scope, with their costs."""

    clock: float
    items: list[tuple[_Item, float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)


@dataclass(eq=False)
class _Scope(Generic[_Item]):
    """The waiting items of one scope, by adapter. `now`: the start of adapters that were idle."""

    clock: float
    now: float = 0.0
    flows: dict[Hashable, _Flow[_Item]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.flows.values()))


class FairQueue(Generic[_Item]):
    """Items by scope and adapter. Not thread-safe."""

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
        """Append `item` to the flow of its scope and adapter. `cost`: estimated work."""
        own = self._scopes.setdefault(scope, _Scope(self._now))
        flow = own.flows.setdefault(adapter, _Flow(own.now))
        if not len(own):
            own.clock = max(own.clock, self._now)
        if not flow.items:
            flow.clock = max(flow.clock, own.now)
        flow.items.append((item, cost))

    def pop(self) -> _Item:
        """Remove and return the next item."""
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
        """Remove an item; False if it is not in the queue."""
        for scope in self._scopes.values():
            for flow in scope.flows.values():
                for at, (waiting, _) in enumerate(flow.items):
                    if waiting is item:
                        del flow.items[at]
                        return True
        return False

    def shed(self, scope: Hashable) -> _Item | None:
        """Remove and return the newest item of the scope with the most items, or None.

        Only if it has at least two items more than `scope`: for a full queue, when `scope` has less
        than its share.
        """
        own = self._scopes.get(scope)
        most = max(self._scopes.values(), key=len, default=None)
        if most is None or most is own or len(most) <= (0 if own is None else len(own)) + 1:
            return None
        flow = max(most.flows.values(), key=len)
        return flow.items.pop()[0]

    def _forget(self) -> None:
        """Remove flows that are idle and without debt."""
        for name, scope in list(self._scopes.items()):
            for adapter, flow in list(scope.flows.items()):
                if not flow.items and flow.clock <= scope.now:
                    del scope.flows[adapter]
            if not len(scope) and scope.clock <= self._now:
                del self._scopes[name]
