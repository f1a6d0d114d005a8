"""Measure adapter swaps with more adapters than fit in memory: SmolLM2-135M, rank 16.

    python -m tools.bench_bank [--output build/bench]

Adapters are chosen at random from working sets below, at and above the budget of the adapter bank.
A swap is the time from naming an adapter until its side inputs are bound; a mixed batch has eight
rows with one adapter each. Above the budget, the mean should rise with the share of misses and not
more: `step` is the mean swap time over the time predicted from hits and misses.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

import loradeploy as ld
from loradeploy.files import atomic_file, write_json
from loradeploy.runtime.timing import sample_feeds
from tools.bench_runtime import prepare

ROOM: Final = 16  # number of adapters that fit in the budget
SETS: Final = (8, 16, 18, 24, 32)
SWAPS: Final = 400
BATCHES: Final = 60
ROWS: Final = 8

console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    arguments = parser.parse_args()
    prepared = prepare()
    bundle, first = Path(prepared["bundles"]["slots"]), Path(prepared["adapters"][0])
    places = tenants(first, max(SETS))
    one = ld.AdapterSession(bundle)
    one.load("one", places[0])
    size = one.statistics.host_bytes
    results = [measure(bundle, places[:count], size) for count in SETS]
    report = {"adapter_bytes": size, "room": ROOM, "results": results}
    write_json(arguments.output / "bank.json", report)
    text = markdown(report)
    with atomic_file(arguments.output / "bank.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)


def tenants(first: Path, count: int) -> list[Path]:
    """Return `count` adapters that differ in their scaling only."""
    places = []
    for number in range(count):
        place = first.parent / "tenants" / f"{number:03}"
        if not (place / "adapter_config.json").exists():
            shutil.copytree(first, place, dirs_exist_ok=True)
            config = json.loads((first / "adapter_config.json").read_text())
            write_json(place / "adapter_config.json", {**config, "lora_alpha": 8 + number})
        places.append(place)
    return places


def measure(bundle: Path, places: Sequence[Path], size: int) -> dict[str, Any]:
    """Measure swaps and mixed batches for one working set."""
    console.print(f"{len(places)} adapters, room for {ROOM}")
    session = ld.AdapterSession(bundle, host_budget=ROOM * size, device_budget=ROOM * size)
    begin = time.perf_counter()
    names = [place.name for place in places]
    for name, place in zip(names, places, strict=True):
        session.register(name, place)
    registered = time.perf_counter() - begin
    choose = random.Random(0)
    alone = sample_feeds(session, 1, past=128, new=1)
    many = sample_feeds(session, ROWS, past=128, new=1)
    outputs = [spec.name for spec in session.manifest.outputs]

    def swap() -> None:
        with session.hold(choose.choice(names)):
            pass

    def mixed() -> None:
        session.run_with_ort_values(outputs, many, [choose.choice(names) for _ in range(ROWS)])

    for name in names:
        session.run_with_ort_values(outputs, alone, name)
    times, hit = timed(session, swap, SWAPS)
    batches, _ = timed(session, mixed, BATCHES)
    hits, misses = times[hit], times[~hit]
    expected = times.mean()
    if len(hits) and len(misses):
        expected = hit.mean() * np.median(hits) + (~hit).mean() * np.median(misses)
    return {
        "adapters": len(names),
        "register_ms": 1e3 * registered / len(names),
        "hit_share": float(hit.mean()),
        "swap_p50_ms": 1e3 * float(np.quantile(times, 0.5)),
        "swap_p99_ms": 1e3 * float(np.quantile(times, 0.99)),
        "hit_ms": 1e3 * float(np.median(hits)) if len(hits) else None,
        "miss_ms": 1e3 * float(np.median(misses)) if len(misses) else None,
        "step": float(times.mean() / expected),
        "mixed_p50_ms": 1e3 * statistics.median(batches),
        "mixed_p99_ms": 1e3 * float(np.quantile(batches, 0.99)),
        "host_bytes": session.statistics.host_bytes,
        "device_bytes": session.statistics.device_bytes,
        "evictions": session.statistics.evictions,
    }


def timed(
    session: ld.AdapterSession, call: Callable[[], None], count: int
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Return the seconds of each call, and whether all adapters it needed were in memory."""
    times, hit = [], []
    for _ in range(count):
        before = session.statistics.misses
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
        hit.append(session.statistics.misses == before)
    return np.array(times), np.array(hit)


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a table."""
    lines = [
        (
            "| adapters / budget | hits | swap p50 / p99 | hit | miss | mean / predicted"
            " | mixed p50, p99 |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["results"]:
        lines.append(
            f"| {row['adapters']} / {report['room']} | {row['hit_share']:.0%}"
            f" | {row['swap_p50_ms']:.3f} / {row['swap_p99_ms']:.1f} ms"
            f" | {_ms(row['hit_ms'])} | {_ms(row['miss_ms'])} | {row['step']:.2f}"
            f" | {row['mixed_p50_ms']:.0f} / {row['mixed_p99_ms']:.0f} ms |"
        )
    return "\n".join(lines) + "\n"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f} ms" if value < 1 else f"{value:.0f} ms"


if __name__ == "__main__":
    main()
