"""Benchmark SmolLM2-135M in loradeploy, OpenVINO GenAI and llama.cpp, with and without adapters.

    python -m tools.bench_peers --openvino-python OV/bin/python \\
        --convert-python CONVERT/bin/python --llama-python LLAMA/bin/python

`engines.py` describes how to create the environments, `requests.py` the requests. Every engine is a
process; they take turns in random order, one at a time, and ratios are computed within each round.
One of loradeploy's forms runs twice, as the control. In float32 all engines must generate the same
tokens, except where two tokens have nearly equal logits; otherwise no conclusion is drawn. In lower
precisions each engine quantizes differently, and the part of equal tokens is only reported. No
conclusion is drawn either if the machine is busy with other work, or from a figure whose control is
not near 1.
Writes peers.json, peers.md and peers.svg.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Final

import loradeploy as ld
from loradeploy.files import atomic_file, write_json
from tools.bench_peers.agreement import NEAR, Parting, agreement, gap, partings
from tools.bench_peers.engines import (
    FORMS,
    PEERS,
    PRECISIONS,
    Pythons,
    add_pythons,
    console,
    pythons_of,
    sides,
    start,
)
from tools.bench_peers.report import draw, markdown
from tools.bench_peers.requests import SCALING, requests
from tools.inputs.made_adapters import make_adapters
from tools.inputs.real_models import bbc_news, cache, smollm2
from tools.timing.alternate import BUSY, NOISE, busy, ratio

ADAPTERS: Final = 8
RANK: Final = 16  # on all linear layers, with an alpha of twice that
CONTROL: Final = "control"
CONTROLLED: Final = "rows"
# The largest allowed ratio of loradeploy to an engine, in seconds or megabytes.
GOALS: Final = {
    "first 512 base": 1.0,
    "first 512 one": 1.0,
    "step 128 base": 1.0,
    "step 128 one": 0.9,
    "step 1024 base": 1.0,
    "step 1024 one": 0.9,
    "eight": 0.4,
    "resident": 1.1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_pythons(parser)
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="[default: all]")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    arguments = parser.parse_args()
    pythons = pythons_of(arguments)
    model, place = smollm2(), cache() / "peers"
    place.mkdir(parents=True, exist_ok=True)
    given = {
        precision: sides(precision, model, _adapters(model, place), pythons, place)
        for precision in arguments.precision or PRECISIONS
    }
    asked = _prompts(place / "fp32-slots")
    results = [
        measure(precision, own, asked, pythons, arguments.rounds)
        for precision, own in given.items()
    ]
    report = {
        "machine": {"cores": os.cpu_count(), "machine": platform.machine()},
        "rank": RANK,
        "rounds": arguments.rounds,
        "goals": GOALS,
        "results": results,
    }
    write_json(arguments.output / "peers.json", report)
    text = markdown(report)
    with atomic_file(arguments.output / "peers.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    draw(results, arguments.output / "peers.svg")
    print(text)
    sys.exit(any(not row["concluded"] for result in results for row in result["ratios"]))


def _adapters(model: Path, place: Path) -> dict[str, str]:
    """Return eight random adapters, made once, for the targets of the first bundle."""
    bundle, adapters = place / "fp32-slots", place / "peer"
    if not bundle.exists():
        console.print("exporting fp32-slots")
        ld.export(model, bundle, **FORMS["slots"])
    if not adapters.exists():
        return make_adapters(bundle, adapters, ADAPTERS, rank=RANK)
    return {path.name: str(path) for path in sorted(adapters.iterdir())}


def _prompts(bundle: Path) -> dict[str, list[int]]:
    """Return prompts of news as tokens: by length, and eight short ones of different lengths."""
    tokenizer = ld.AdapterSession(bundle).texts.base.tokenizer
    files = sorted((bbc_news() / "business").glob("*.txt"))[:60]
    tokens = tokenizer.encode(" ".join(file.read_text(encoding="latin-1") for file in files))
    prompts = {str(length): tokens[:length] for length in (128, 512, 1024)}
    for number in range(ADAPTERS):
        begin = 2000 + 100 * number
        prompts[f"short {number}"] = tokens[begin : begin + 17 + 5 * number]
    return prompts


def measure(
    precision: str,
    given: Mapping[str, Mapping[str, Any]],
    prompts: Mapping[str, Any],
    pythons: Pythons,
    rounds: int,
) -> dict[str, Any]:
    """Measure all sides in one precision; they take turns."""
    own = {**given, CONTROL: given[CONTROLLED]}
    common = {"prompts": prompts, "scaling": SCALING}
    console.print(f"{precision}: starting {', '.join(own)}")
    workers = {side: start(side, {**own[side], **common}, pythons) for side in own}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in own}
    work = []
    try:
        for number in range(rounds):
            order = list(workers)
            random.Random(number).shuffle(order)
            for side in order:
                work.append(busy(0.5))
                runs[side] += workers[side].results(1)
            console.print(f"{precision}: round {number + 1} of {rounds}")
    finally:
        for worker in workers.values():
            worker.close()
    slots = given["slots"]
    asked = requests(prompts, list(slots["adapters"]))
    return summary(
        precision, runs, work, lambda at: gap(at, asked, slots["bundle"], slots["adapters"])
    )


def summary(
    precision: str,
    runs: Mapping[str, list[dict[str, Any]]],
    work: list[float | None],
    gap_at: Callable[[Parting], float],
) -> dict[str, Any]:
    """Return milliseconds, ratios, the control, and reasons why they are not conclusive.

    `gap_at`: returns the difference of the two tokens' logits where an engine's tokens diverge.
    """
    seconds = {
        side: {what: [run["seconds"][what] for run in own] for what in own[0]["seconds"]}
        for side, own in runs.items()
    }
    for side, own in runs.items():
        seconds[side]["resident"] = [run["resident"] for run in own]
    problems = []
    known = [part for part in work if part is not None]
    if len(known) < len(work) or max(known) > BUSY:
        shown = f"{max(known):.0%} of the processors" if known else "unknown"
        problems.append(f"the machine has other work ({shown})")
    control = {
        what: ratio(seconds[CONTROL][what], seconds[CONTROLLED][what]) for what in seconds[CONTROL]
    }
    far = {what for what, one in control.items() if max(1 - one.low, one.high - 1) > NOISE}
    expected = runs["slots"][-1]["tokens"]
    same = {side: agreement(own[-1]["tokens"], expected) for side, own in runs.items()}
    gaps: dict[str, float] = {}
    if precision == "fp32":
        for side, own in runs.items():
            if apart := partings(own[-1]["tokens"], expected):
                gaps[side] = max(map(gap_at, apart))
        if differing := [side for side, most in gaps.items() if most > NEAR]:
            problems.append(f"other tokens from {', '.join(differing)}: not the same work")
    return {
        "precision": precision,
        "milliseconds": {
            side: {w: median(v) * (1 if w == "resident" else 1e3) for w, v in own.items()}
            for side, own in seconds.items()
        },
        "swap_ms": {
            side: median(
                (a - b) / ADAPTERS * 1e3
                for a, b in zip(own["alternating"], own["kept"], strict=True)
            )
            for side, own in seconds.items()
        },
        "load_ms": {side: own[-1]["load"] * 1e3 for side, own in runs.items()},
        "peak_mb": {side: own[-1]["peak"] for side, own in runs.items()},
        "ratios": [
            {
                "what": what,
                "ours": form,
                "peer": peer,
                "goal": goal,
                "concluded": not problems and what not in far,
            }
            | asdict(ratio(seconds[form][what], seconds[peer][what]))
            for what, goal in GOALS.items()
            for peer in PEERS
            if peer in seconds
            for form in FORMS
        ],
        "control": {what: asdict(one) for what, one in control.items()},
        "same_tokens": same,
        "gaps": gaps,
        "not_concluded": problems,
    }


if __name__ == "__main__":
    main()
