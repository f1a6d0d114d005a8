"""A step-by-step simulation of nodes that serve adapters.

In a step, a node generates one token for each of its rows. Requests join and leave between steps,
and wait while their adapter is loaded. The duration of a step is measured (measure.py).
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

# A node is overloaded if it has this many more requests than another, as a multiple of its rows.
_BUSY: Final = 1.5


@dataclass(frozen=True)
class Figures:
    """Measurements of one node, in seconds and bytes.

    `step`: duration of a step by number of rows; interpolated in between.
    `mixed`: factor of the duration of a step whose rows have several adapters.
    `prefill`: time per request, and per prompt token. `request`: overhead of a request, such as
    HTTP. `load`: time to load an adapter, constant and per byte. `rank_bytes`: size of an adapter
    of rank 1. `start`: time to start a node.
    """

    step: Mapping[int, float]
    mixed: float
    prefill: tuple[float, float]
    request: float
    load: tuple[float, float]
    rank_bytes: float
    start: float

    def step_time(self, rows: int, adapters: int) -> float:
        """Return the duration of a step."""
        known = sorted(self.step)
        factor = self.mixed if adapters > 1 else 1.0
        if rows <= known[0]:
            return self.step[known[0]] * factor
        if rows >= known[-1]:
            return self.step[known[-1]] * rows / known[-1] * factor
        right = bisect.bisect_left(known, rows)
        low, high = known[right - 1], known[right]
        share = (rows - low) / (high - low)
        return (self.step[low] * (1 - share) + self.step[high] * share) * factor


@dataclass(frozen=True)
class Load:
    """The requests: `rate` per second, or, if it is 0, those of `clients` that wait for answers.

    `adapters`: number of adapters; they have the `ranks` in turn, and the k-th is requested with
    weight 1 / k ** `zipf`. `prompt`, `output`: mean numbers of tokens. `spread`: whether output
    lengths vary from half to one and a half times the mean.
    """

    adapters: int = 100
    zipf: float = 1.0
    ranks: tuple[int, ...] = (8, 16, 32)
    prompt: int = 128
    output: int = 64
    spread: bool = True
    rate: float = 0.0
    clients: int = 0
    requests: int = 2000
    seed: int = 0

    @property
    def popularity(self) -> list[float]:
        """Each adapter's share of the requests, the most popular first."""
        weights = [1 / place**self.zipf for place in range(1, self.adapters + 1)]
        return [weight / sum(weights) for weight in weights]

    def rank(self, adapter: int) -> int:
        """Return the rank of an adapter."""
        return self.ranks[adapter % len(self.ranks)]


@dataclass(frozen=True)
class Cluster:
    """The nodes. `memory`: bytes for adapters in each; `routing`: a key of ROUTINGS."""

    nodes: int = 2
    rows: int = 8
    memory: float = float("inf")
    routing: str = "sticky"
    cold: int = 0  # number of nodes that begin to start with the first request
    price: float = 1.0  # price of a node per hour


@dataclass
class _Request:
    number: int
    adapter: int
    prompt: int
    output: int
    arrived: float
    begun: float = 0.0
    left: int = 0
    ready: float = 0.0  # time at which its adapter is loaded


@dataclass
class _Node:
    number: int
    time: float = 0.0
    waiting: deque[_Request] = field(default_factory=deque)
    running: list[_Request] = field(default_factory=list)
    resident: OrderedDict[int, float] = field(default_factory=OrderedDict)  # bytes by adapter
    ready: dict[int, float] = field(default_factory=dict)  # times at which those were loaded
    held: float = 0.0  # total bytes of those
    busy: float = 0.0

    @property
    def queued(self) -> int:
        return len(self.waiting) + len(self.running)


@dataclass
class Outcome:
    """The results of a simulation or a run; times in seconds."""

    seconds: float
    tokens: int
    first: list[float]
    between: list[float]
    whole: list[float]
    hits: int
    loads: int
    busy: float

    @property
    def rate(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds

    def cost(self, cluster: Cluster) -> float:
        """Return the cost of a million tokens, from the price of a node per hour."""
        return cluster.nodes * cluster.price / 3600 / self.rate * 1e6


def quantile(values: Sequence[float], share: float) -> float:
    """Return the quantile of `values`; NaN if there are none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


# -- which node a request goes to --------------------------------------------------------------


def hashed(adapter: int, nodes: int) -> int:
    """Return the node of an adapter by rendezvous hashing, independent of other adapters."""
    return max(range(nodes), key=lambda n: hashlib.md5(f"{adapter}/{n}".encode()).digest())


def planned(load: Load, cluster: Cluster, figures: Figures) -> list[list[int]]:
    """Assign each adapter to nodes: popular adapters to several, with the load balanced.

    An adapter gets as many nodes as its share of the requests fills. Each copy is placed on the
    node with the least load that has room in memory.
    """
    work = [0.0] * cluster.nodes
    room = [cluster.memory] * cluster.nodes
    homes: list[list[int]] = []
    for adapter, share in enumerate(load.popularity):
        copies = min(cluster.nodes, math.ceil(share * cluster.nodes))
        size = load.rank(adapter) * figures.rank_bytes
        order = sorted(range(cluster.nodes), key=lambda n: (room[n] < size, work[n], n))
        homes.append(order[:copies])
        for node in order[:copies]:
            work[node] += share / copies
            room[node] -= size
    return homes


Route = Callable[[_Request, Sequence[_Node]], _Node]


def _least(load: Load, cluster: Cluster, figures: Figures) -> Route:
    return lambda request, nodes: _idlest(nodes)


def _idlest(nodes: Sequence[_Node]) -> _Node:
    return min(nodes, key=lambda node: (node.queued, node.number))


def _sticky(load: Load, cluster: Cluster, figures: Figures) -> Route:
    return _homes([[hashed(adapter, cluster.nodes)] for adapter in range(load.adapters)], cluster)


def _planned(load: Load, cluster: Cluster, figures: Figures) -> Route:
    return _homes(planned(load, cluster, figures), cluster)


def _homes(homes: Sequence[Sequence[int]], cluster: Cluster) -> Route:
    """Return a route to an adapter's node, unless it is much busier than the least busy node."""

    def route(request: _Request, nodes: Sequence[_Node]) -> _Node:
        own = [node for node in nodes if node.number in homes[request.adapter]]
        home, other = _idlest(own or nodes), _idlest(nodes)
        return other if home.queued - other.queued > _BUSY * cluster.rows else home

    return route


ROUTINGS: Final[Mapping[str, Callable[[Load, Cluster, Figures], Route]]] = {
    "least": _least,
    "sticky": _sticky,
    "planned": _planned,
}


# -- the simulation ----------------------------------------------------------------------------


class _Simulation:
    """The nodes of a cluster, the requests that have not arrived yet, and the outcome so far."""

    def __init__(self, load: Load, cluster: Cluster, figures: Figures) -> None:
        self.load, self.cluster, self.figures = load, cluster, figures
        self.outcome = Outcome(0.0, 0, [], [], [], 0, 0, 0.0)
        self.nodes = [_Node(number) for number in range(cluster.nodes)]
        self.arrivals: list[tuple[float, int, _Request]] = []
        self.asked = 0  # requests made so far
        self._chance = random.Random(load.seed)
        self._popularity = load.popularity
        if load.rate:
            at = 0.0
            for _ in range(load.requests):
                at += self._chance.expovariate(load.rate)
                self.arrive(at)
        else:
            for _ in range(min(load.clients, load.requests)):
                self.arrive(0.0)

    def arrive(self, at: float) -> None:
        """Make a request that arrives at `at`."""
        load = self.load
        (adapter,) = self._chance.choices(range(load.adapters), self._popularity)
        output = load.output
        if load.spread:
            output = max(1, round(load.output * self._chance.uniform(0.5, 1.5)))
        made = _Request(self.asked, adapter, load.prompt, output, at, left=output)
        heapq.heappush(self.arrivals, (at, made.number, made))
        self.asked += 1

    def take(self, node: _Node, one: _Request) -> None:
        """Let a request wait in `node`, which loads its adapter if it has not."""
        figures = self.figures
        size = self.load.rank(one.adapter) * figures.rank_bytes
        if one.adapter in node.resident:
            self.outcome.hits += 1
            one.ready = max(one.arrived, node.ready[one.adapter])  # it may still be loading
        else:
            self.outcome.loads += 1
            one.ready = one.arrived + figures.load[0] + figures.load[1] * size
            node.ready[one.adapter] = one.ready
            node.resident[one.adapter] = size
            node.held += size
        node.resident.move_to_end(one.adapter)
        while node.held > self.cluster.memory and len(node.resident) > 1:
            node.held -= node.resident.popitem(last=False)[1]
        if not node.queued:
            node.time = max(node.time, one.arrived)
        node.waiting.append(one)

    def step(self, node: _Node) -> list[_Request]:
        """Let waiting requests join, and generate a token for each row; return ended requests."""
        figures = self.figures
        begin = node.time
        ready = [one for one in node.waiting if one.ready <= node.time]
        if not node.running and not ready:
            node.time = min(one.ready for one in node.waiting)
            return []
        for one in ready[: self.cluster.rows - len(node.running)]:
            node.waiting.remove(one)
            node.running.append(one)
            node.time += figures.prefill[0] + figures.prefill[1] * one.prompt
            one.begun = node.time
            one.left -= 1  # prefill generates the first token
            self.outcome.first.append(node.time - one.arrived + figures.request)
        if any(one.left for one in node.running):
            rows = [one for one in node.running if one.left]
            adapters = len({one.adapter for one in rows})
            node.time += figures.step_time(len(rows), adapters)
            for one in rows:
                one.left -= 1
        ended = [one for one in node.running if not one.left]
        node.running = [one for one in node.running if one.left]
        node.busy += node.time - begin
        return ended

    def end(self, node: _Node, one: _Request) -> None:
        """Account for a request that has ended; its client makes the next one."""
        outcome, request_time = self.outcome, self.figures.request
        outcome.tokens += one.output
        outcome.seconds = max(outcome.seconds, node.time)
        outcome.whole.append(node.time - one.arrived + request_time)
        if one.output > 1:
            outcome.between.append((node.time - one.begun) / (one.output - 1))
        if not self.load.rate and self.asked < self.load.requests:
            self.arrive(node.time + request_time)


def simulate(load: Load, cluster: Cluster, figures: Figures) -> Outcome:
    """Simulate the requests of `load`. The same arguments give the same outcome."""
    simulation = _Simulation(load, cluster, figures)
    nodes, arrivals = simulation.nodes, simulation.arrivals
    route = ROUTINGS[cluster.routing](load, cluster, figures)
    while arrivals or any(node.queued for node in nodes):
        active = [node for node in nodes if node.queued]
        node = min(active, key=lambda one: one.time, default=None)
        if arrivals and (node is None or arrivals[0][0] <= node.time):
            _, _, one = heapq.heappop(arrivals)
            warm = cluster.nodes if one.arrived >= figures.start else cluster.nodes - cluster.cold
            simulation.take(route(one, nodes[:warm]), one)
            continue
        assert node is not None
        for one in simulation.step(node):
            simulation.end(node, one)
    outcome = simulation.outcome
    outcome.busy = sum(node.busy for node in nodes) / (cluster.nodes * outcome.seconds)
    return outcome
