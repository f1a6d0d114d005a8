"""Measures latency against load: requests arrive at a given rate, even if the server is too slow.

Arrivals are a Poisson process. The time to the first token is measured from the intended arrival
time. The clients and the server are separate processes.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import loradeploy as ld
from tools.bench_serve.load import Tokens
from tools.bench_serve.sides import Ask, ask_url, bytes_of, percentiles, started_server
from tools.timing.alternate import Side, Worker, serve_worker
from tools.timing.charts import svg_axes

_COLORS: Final = ("#4c72b0", "#c44e52")
_CAPACITY: Final = 3  # requests per row of the run that measures the highest request rate


@dataclass(frozen=True)
class Arrival:
    """A request, and its arrival time in seconds after the first."""

    at: float
    prompt: Tokens
    adapter: str


@dataclass
class Latencies:
    """Seconds to the first token of each request, between its tokens, and of the whole run."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    seconds: float = 0.0


def server(
    bundle: str, adapters: Mapping[str, str], rows: int, waiting: int, room: int | None
) -> Side:
    """Return a call that reports the URL of a server with `rows` rows and the adapters it read.

    `room`: number of adapters that fit in its memory; None: all.
    """
    budget = None if room is None else room * bytes_of(bundle, next(iter(adapters.values())))
    session = ld.AdapterSession(bundle, host_budget=budget)
    for name, path in adapters.items():
        session.register(name, path)
    url = started_server(session, rows, waiting)

    def call() -> dict[str, Any]:
        return {"url": url, "reads": session.statistics.misses}

    return call


def arrivals(
    prompts: Sequence[Tokens], asked: Sequence[str], rate: float | None, seed: int
) -> list[Arrival]:
    """Return requests at random times, `rate` per second; all at once if `rate` is None."""
    chance, at = random.Random(seed), 0.0
    found = []
    for prompt, adapter in zip(prompts, asked, strict=True):
        found.append(Arrival(at, prompt, adapter))
        at += 0.0 if rate is None else chance.expovariate(rate)
    return found


async def offer(ask: Ask, requests: Sequence[Arrival]) -> Latencies:
    """Send the requests at their arrival times, and wait for all answers."""
    found, began = Latencies(), time.perf_counter()

    async def one(request: Arrival) -> None:
        last = began + request.at
        await asyncio.sleep(last - time.perf_counter())
        taken = found.first
        async for _ in ask(request.prompt, request.adapter):
            now = time.perf_counter()
            taken.append(now - last)
            taken, last = found.between, now
        assert taken is found.between, "a request without a token"

    await asyncio.gather(*map(one, requests))
    found.seconds = time.perf_counter() - began
    return found


def measure_load(
    sides: Mapping[str, Mapping[str, Any]],
    prompt: Callable[[int], Tokens],
    asked: Mapping[str, Sequence[str]],
    tokens: int,
    ends: Sequence[int],
    parts: Sequence[float],
    seconds: float,
) -> dict[str, Any]:
    """Measure a curve for each side.

    `sides`: the arguments of each side's `server`. `asked`: the adapters requested in turn.
    `prompt`: returns the prompt of a request by its unique number. `parts`: the rates, as parts of
    the highest rate that the first side can answer.
    """
    barred: dict[int | str, float] = dict.fromkeys(ends, -100.0)
    workers = {
        side: Worker("tools.bench_serve.latency", "server", given) for side, given in sides.items()
    }
    number = 0
    try:
        ask = {
            side: ask_url(worker.results(1)[0]["url"], tokens, barred)
            for side, worker in workers.items()
        }

        def taken(side: str, count: int, rate: float | None) -> Latencies:
            nonlocal number
            own, numbers = asked[side], range(number, number + count)
            requests = arrivals(
                [prompt(each) for each in numbers],
                [own[each % len(own)] for each in numbers],
                rate,
                number,
            )
            number += count
            return asyncio.run(offer(ask[side], requests))

        first = next(iter(sides))
        count = _CAPACITY * int(sides[first]["rows"])
        for side in sides:  # the first requests of a process are slower
            taken(side, int(sides[side]["rows"]), None)
        capacity = count / taken(first, count, None).seconds
        curves: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for part in parts:
            rate = part * capacity
            for side, worker in workers.items():
                before = worker.results(1)[0]["reads"]
                own = taken(side, max(2, round(rate * seconds)), rate)
                curves[side].append(
                    {
                        "rate": rate,
                        "requests": len(own.first),
                        "answered_per_second": len(own.first) / own.seconds,
                        "first_token_ms": percentiles(own.first),
                        "inter_token_ms": percentiles(own.between),
                        "adapters_read": worker.results(1)[0]["reads"] - before,
                    }
                )
    finally:
        for worker in workers.values():
            worker.close()
    return {"capacity": capacity, "curves": curves}


def load_markdown(report: Mapping[str, Any]) -> str:
    """Return the curves as a table."""
    head = "| side | offered, requests/s | answered | first token p50 / p99, ms |"
    lines = [
        f"{head} between tokens p50 / p99, ms | adapters read / requests |",
        "|---|---|---|---|---|---|",
    ]
    for side, points in report["curves"].items():
        for point in points:
            first, between = point["first_token_ms"], point["inter_token_ms"]
            lines.append(
                f"| {side} | {point['rate']:.2f} | {point['answered_per_second']:.2f} |"
                f" {first[0]:.0f} / {first[1]:.0f} | {between[0]:.0f} / {between[1]:.0f} |"
                f" {point['adapters_read']} / {point['requests']} |"
            )
    return "\n".join(lines) + "\n"


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Draw milliseconds against offered requests per second: p50 and p99 of each side."""
    from matplotlib import ticker

    shown = (("first_token_ms", "time to the first token"), ("inter_token_ms", "between tokens"))
    grid = svg_axes(file, 1, len(shown), name="serving", font_size=9, figsize=(7, 3.4), bottom=0.16)
    with grid as ((*axes,),):
        for axis, (name, title) in zip(axes, shown, strict=True):
            for color, (side, points) in zip(_COLORS, report["curves"].items(), strict=False):
                rates = [point["rate"] for point in points]
                for at, (style, part) in enumerate((("-", "p50"), ("--", "p99"))):
                    values = [point[name][at] for point in points]
                    label = f"{side}, {part}"
                    axis.plot(rates, values, style, color=color, marker=".", label=label)
            axis.set_title(f"{title}: ms", loc="left", fontsize=9)
            axis.set_xlabel("offered requests/s")
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:.0f}")
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_formatter("")
            axis.spines[["top", "right"]].set_visible(False)
        lines, names = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(lines, names, loc="lower center", ncols=2, frameon=False, fontsize=8)


if __name__ == "__main__":
    serve_worker({"server": server}, warm_up=0)
