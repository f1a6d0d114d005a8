"""What every engine of bench_peers is asked for; read in each engine's own environment."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from tools.timing.alternate import Side

Tokens = list[int]
Request = tuple[Tokens, str | None]  # a prompt and its adapter's name
LENGTHS: Final = (128, 512, 1024)
NEW: Final = 24  # tokens behind the first one whose time is a step's
SCALING: Final = 2.0  # of the adapters of made_adapters
SHORT: Final = 8  # and of each of eight requests


class Peer(Protocol):
    """An engine with its model."""

    def load(self, name: str, directory: str, scaling: float) -> None:
        """Load a PEFT adapter, or what was made of it, so that it can be asked for."""

    def generate(self, rows: Sequence[Request], new: int) -> list[Tokens]:
        """`new` greedy tokens for each prompt with its adapter, as fast as the engine does them."""


def requests(prompts: Mapping[str, Tokens], names: Sequence[str]) -> dict[str, list[Request]]:
    """The requests whose tokens are compared, by their name in `tokens`."""
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
    """One call: every figure of one engine, in seconds, with the tokens that it gave.

    `first N`: to the first token of a prompt of N. `step N`: a token's time behind it. `one`: with
    an adapter. `alternating`: eight requests one after another, each with another adapter than
    the one before; `kept`: with one adapter for all. `eight`: those of `alternating` at
    once.
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
        timed([(eight[0][0], names[0])], SHORT)  # the adapter of all that follow
        found["kept"] = sum(timed([(prompt, names[0])], SHORT)[0] for prompt, _ in eight)
        found["eight"], tokens["eight"] = timed(eight, SHORT)
        return {
            "seconds": found,
            "tokens": tokens,
            "load": sorted(load.values())[len(load) // 2],
            "resident": resident(),
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }

    return call


def resident() -> float:
    """MB of this process in memory."""
    with open("/proc/self/status", encoding="ascii") as file:
        (line,) = (line for line in file if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024
