"""The requests of bench_peers. Also imported in each engine's environment."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from tools.timing.alternate import Side

Tokens = list[int]
Request = tuple[Tokens, str | None]  # a prompt and its adapter's name
LENGTHS: Final = (128, 512, 1024)
NEW: Final = 24  # number of tokens after the first, over which the time of a step is averaged
SCALING: Final = 2.0  # scaling of the adapters of made_adapters
SHORT: Final = 8  # generated tokens of each of the eight short requests


class Peer(Protocol):
    """An engine with its model."""

    def load(self, name: str, directory: str, scaling: float) -> None:
        """Load a PEFT adapter, or a file converted from one, under a name."""

    def generate(self, rows: Sequence[Request], new: int) -> list[Tokens]:
        """Generate `new` tokens greedily for each prompt with its adapter, as fast as possible."""


def requests(prompts: Mapping[str, Tokens], names: Sequence[str]) -> dict[str, list[Request]]:
    """Return the requests whose tokens are compared, by name."""
    eight: list[Request] = [(prompts[f"short {number}"], name) for number, name in enumerate(names)]
    single: dict[str, list[Request]] = {
        f"{length} {use}": [(prompts[str(length)], name)]
        for length in LENGTHS
        for use, name in (("base", None), ("one", names[0]))
    }
    return {**single, "alternating": eight, "eight": eight}


def measured(
    peer: Peer, prompts: Mapping[str, Tokens], adapters: Mapping[str, str], scaling: float
) -> Side:
    """Return a call that measures every figure of an engine, in seconds, with its tokens.

    `first N`: time to the first token of a prompt of N tokens. `step N`: time of each further
    token. `… one`: with an adapter. `alternating`: eight requests one after another, each with
    another adapter; `kept`: the same with one adapter for all. `eight`: the eight requests at once.
    """
    load = {}
    for name, directory in adapters.items():
        began = time.perf_counter()
        peer.load(name, directory, scaling)
        load[name] = time.perf_counter() - began
    names = list(adapters)
    asked = requests(prompts, names)
    eight = asked["eight"]

    def call() -> dict[str, Any]:
        found: dict[str, float] = {}
        tokens: dict[str, list[Tokens]] = {}

        def timed(rows: Sequence[Request], new: int) -> tuple[float, list[Tokens]]:
            began = time.perf_counter()
            given = peer.generate(rows, new)
            return time.perf_counter() - began, given

        for what, row in asked.items():
            if row is eight:
                continue
            first, _ = timed(row, 1)
            whole, tokens[what] = timed(row, 1 + NEW)
            found[f"first {what}"] = first
            found[f"step {what}"] = (whole - first) / NEW
        apart = [timed([row], SHORT) for row in eight]
        found["alternating"] = sum(seconds for seconds, _ in apart)
        tokens["alternating"] = [given[0] for _, given in apart]
        timed([(eight[0][0], names[0])], SHORT)  # switches to the adapter of the next requests
        found["kept"] = sum(timed([(prompt, names[0])], SHORT)[0] for prompt, _ in eight)
        found["eight"], tokens["eight"] = timed(eight, SHORT)
        return {
            "seconds": found,
            "tokens": tokens,
            "load": sorted(load.values())[len(load) // 2],
            "resident": memory("VmRSS"),
            "peak": memory(
                "VmHWM"
            ),  # getrusage's is at least that of the process that started this
        }

    return call


def memory(field: str) -> float:
    """Return the memory of this process in MB: now resident, "VmRSS", or at most, "VmHWM"."""
    with open("/proc/self/status", encoding="ascii") as file:
        (line,) = (line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024
