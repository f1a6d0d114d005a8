"""Serve many clients and adapters: tokens a second, time to the first token, time between tokens.

    python -m tools.bench_serve --bundle fp32=DIR --bundle int4=DIR --output build/bench

A bundle is one of SmolLM2, as `loradeploy export --attention gqa --layout rows` makes it. Sixteen
clients, each of which asks again once it has its answer, greedily and for a fixed length, so that
every side generates as many tokens of the same prompts:

    engine            the engine, eight adapters, a client's is one of them
    control           the same once more, in another process
    one adapter       the engine, one adapter for all clients
    http              the server over HTTP, streaming, eight adapters
    genai             the same requests one after another in onnxruntime-genai, switching adapters
    thousand          the engine, 1,000 registered small adapters by Zipf's law, room for 32
    eight small       the engine, eight of these

Each side is a process; they take turns in random order, one at a time. Ratios are taken round by
round. Nothing is concluded where the machine has other work, the control is not near 1, or a side
of the same requests gives other texts.

    --load 0.25 0.5 …   latency against load, of `thousand` and `eight small` over HTTP instead
    --costs 1 8 16      what steps of so many rows take of the processor, in the graph and besides
    --draw FILE.json    the picture of what --load wrote
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

import loradeploy as ld
from loradeploy.conversion import convert
from loradeploy.files import atomic_file, write_json
from tools import genai_builder
from tools.alternate import BUSY, NOISE, Ratio, Worker, busy, ratio
from tools.made_adapters import make_adapters
from tools.serve_cost import cost_markdown, measure_costs
from tools.serve_latency import draw, load_markdown, measure_load
from tools.serve_load import Load
from tools.serve_sides import LAST, RunReport, percentiles

console = Console(stderr=True, highlight=False)

ADAPTERS: Final = 8
RANK: Final = 16  # of these, on all linear layers
REGISTERED: Final = 1000
ROOM: Final = 32
_WORDS: Final = (
    "the government said shares in company fell after bank reported growth while match was won"
    " by minister who told reporters that prices may rise again next year because of oil"
)


@dataclass(frozen=True)
class Goal:
    """A ratio that is looked for: tokens/s of `side` over those of `over`."""

    side: str
    over: str
    least: float


GOALS: Final = (
    Goal("engine", "genai", 3.0),
    Goal("engine", "one adapter", 0.85),
    Goal("http", "engine", 0.9),
    Goal("thousand", "eight small", 0.7),
)


def traffic(clients: int, requests: int, tokens: int, vocabulary: Any, seed: int) -> Load:
    """What each client asks for, in turn: prompts of 16 to 48 tokens, and `tokens` new ones."""
    chance = random.Random(seed)
    prompts = [
        [
            vocabulary.encode(" ".join(chance.choices(_WORDS.split(), k=chance.randint(14, 42))))
            for _ in range(requests)
        ]
        for _ in range(clients)
    ]
    return Load(prompts, tokens)


def zipf(count: int, length: int, seed: int) -> list[int]:
    """Numbers of adapters: the k-th is asked for in proportion to 1/k."""
    weights = [1 / (rank + 1) for rank in range(count)]
    return random.Random(seed).choices(range(count), weights, k=length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--sides", help="some of the sides, with commas")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round")
    parser.add_argument("--tokens", type=int, default=32, help="new ones of each request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--registered", type=int, default=REGISTERED)
    parser.add_argument("--load", type=float, nargs="+", metavar="PART", help="of what is answered")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each rate of --load")
    parser.add_argument("--costs", type=int, nargs="+", metavar="ROWS", help="rows of a step")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="draw what --load wrote")
    arguments = parser.parse_args()
    if arguments.draw is not None:
        report = json.loads(arguments.draw.read_text(encoding="utf-8"))
        draw(report, arguments.draw.with_suffix(".svg"))
        return
    if not arguments.bundle:
        parser.error("give --bundle NAME=DIR")
    if arguments.load is not None or arguments.costs is not None:
        _measure_apart(arguments)
        return
    reports = []
    with tempfile.TemporaryDirectory() as scratch:
        for given in arguments.bundle:
            name, _, directory = given.partition("=")
            reports.append(measure(name, Path(directory), arguments, Path(scratch) / name))
    result = {
        "machine": {"cores": os.cpu_count(), "machine": platform.machine()},
        "clients": arguments.clients,
        "requests": arguments.requests,
        "tokens": arguments.tokens,
        "results": reports,
    }
    write_json(arguments.output / "serve.json", result)
    text = markdown(reports)
    with atomic_file(arguments.output / "serve.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)
    sys.exit(any(report["not_concluded"] for report in reports))


def _measure_apart(arguments: Any) -> None:
    """What --load and --costs ask for, of the bundles by themselves."""
    for given in arguments.bundle:
        name, _, directory = given.partition("=")
        bundle = Path(directory)
        idle = busy()
        with tempfile.TemporaryDirectory() as scratch:
            if arguments.load is not None:
                file = arguments.output / f"load-{name}.json"
                found = load_of(bundle, arguments, Path(scratch))
                text = load_markdown(found)
            else:
                file = arguments.output / f"costs-{name}.json"
                found = costs_of(bundle, arguments, Path(scratch))
                text = cost_markdown(found)
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "busy": idle}
        write_json(file, {"machine": machine, "bundle": name, **found})
        if arguments.load is not None:
            draw(found, file.with_suffix(".svg"))
        print(text)
        if idle is None or idle > BUSY:
            print(f"The machine has other work: nothing is concluded of {name}.")


def load_of(bundle: Path, arguments: Any, scratch: Path) -> dict[str, Any]:
    """Latency against load, of small adapters that are all in memory, and of many more."""
    tokenizer = ld.AdapterSession(bundle).texts.base.tokenizer
    small = small_adapters(bundle, scratch, arguments.registered)

    def prompt(number: int) -> list[int]:
        ((own,),) = traffic(1, 1, arguments.tokens, tokenizer, number).prompts
        return own

    names = list(small)
    few = {name: small[name] for name in names[:ADAPTERS]}
    # None of a run that is overloaded is refused, so that all of them count.
    common = {"bundle": str(bundle), "rows": arguments.clients, "waiting": 100_000}
    eight, many = f"{ADAPTERS} adapters", f"{len(small)} adapters, room for {ROOM}"
    found = measure_load(
        {
            eight: {**common, "adapters": few, "room": None},
            many: {**common, "adapters": small, "room": ROOM},
        },
        prompt,
        {
            eight: list(few),
            many: [names[number] for number in zipf(len(small), 100_000, 1)],
        },
        arguments.tokens,
        _ends(bundle),
        arguments.load,
        arguments.seconds,
    )
    return {"rows": arguments.clients, "tokens": arguments.tokens, **found}


def costs_of(bundle: Path, arguments: Any, scratch: Path) -> dict[str, Any]:
    """What a step takes of the processor, of the engine and over HTTP."""
    tokenizer = ld.AdapterSession(bundle).texts.base.tokenizer
    load = traffic(max(arguments.costs), 1, arguments.tokens, tokenizer, 0)
    given = {
        "bundle": str(bundle),
        "adapters": make_adapters(bundle, scratch / "a", ADAPTERS, rank=RANK),
        "prompts": [own for (own,) in load.prompts],
        "asked": [f"a{number % ADAPTERS}" for number in range(max(arguments.costs))],
        "tokens": load.tokens,
        "ends": _ends(bundle),
    }
    return {"costs": measure_costs(given, arguments.costs, arguments.rounds)}


def small_adapters(bundle: Path, scratch: Path, count: int) -> dict[str, str]:
    """Adapters of which there can be many."""
    return make_adapters(bundle, scratch / "small", count, rank=4, modules=("q_proj", "v_proj"))


def _ends(bundle: Path) -> list[int]:
    """The tokens that end a text, which are barred: all sides generate as many."""
    ends = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))["model"]
    end = ends["eos_token_id"]
    return end if isinstance(end, list) else [end]


def measure(name: str, bundle: Path, arguments: Any, scratch: Path) -> dict[str, Any]:
    """All sides on one bundle, in turns."""
    tokenizer = ld.AdapterSession(bundle).texts.base.tokenizer
    load = traffic(arguments.clients, arguments.requests, arguments.tokens, tokenizer, 0)
    chosen = None if arguments.sides is None else arguments.sides.split(",")
    given = _arguments(bundle, load, arguments, scratch, chosen)
    idle = busy()
    console.print(f"{name}: starting {', '.join(given)}")
    workers = {side: _start(side, own) for side, own in given.items()}
    runs: dict[str, list[RunReport]] = {side: [] for side in workers}
    work = [] if idle is None else [idle]
    try:
        for number in range(arguments.rounds):
            order = list(workers)
            random.Random(number).shuffle(order)
            for side in order:
                if (other := busy(0.5)) is not None:
                    work.append(other)
                (found,) = workers[side].results(1)
                runs[side].append(RunReport(**found))
            console.print(f"{name}: round {number + 1} of {arguments.rounds}")
    finally:
        for worker in workers.values():
            worker.close()
    return summary(name, runs, max(work, default=None))


def _arguments(
    bundle: Path, load: Load, arguments: Any, scratch: Path, chosen: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    """What each side's process is given."""
    adapters = make_adapters(bundle, scratch / "a", ADAPTERS, rank=RANK)
    common = {
        "bundle": str(bundle),
        "prompts": load.prompts,
        "tokens": load.tokens,
        "ends": _ends(bundle),
    }
    clients = range(len(load.prompts))
    requests = range(arguments.requests)
    mixed = [[f"a{client % ADAPTERS}" for _ in requests] for client in clients]
    own = {**common, "adapters": adapters, "asked": mixed}
    sides: dict[str, dict[str, Any]] = {
        "engine": own,
        "control": own,
        "one adapter": {**own, "asked": [["a0" for _ in requests] for _ in clients]},
        "http": {**own, "http": True},
    }
    if genai_builder.PYTHON.exists():
        natives = {}
        for name, path in adapters.items():
            natives[name] = str(scratch / f"{name}.onnx_adapter")
            convert(path, natives[name], bundle=bundle)
        sides["genai"] = {**own, "adapters": natives}
    if chosen is None or {"thousand", "eight small"} & set(chosen):
        small = small_adapters(bundle, scratch, arguments.registered)
        drawn = zipf(len(small), len(clients) * len(requests), 1)
        names = list(small)
        few = {name: small[name] for name in names[:ADAPTERS]}
        own = {**common, "room": ROOM}
        by_zipf = [
            [names[drawn[client * len(requests) + turn]] for turn in requests] for client in clients
        ]
        of_eight = [[names[client % ADAPTERS] for _ in requests] for client in clients]
        sides["thousand"] = {**own, "adapters": small, "asked": by_zipf}
        sides["eight small"] = {**own, "adapters": few, "asked": of_eight}
    return {side: own for side, own in sides.items() if chosen is None or side in chosen}


def _start(side: str, given: Mapping[str, Any]) -> Worker:
    if side == "genai":
        return Worker(
            "tools.bench_genai", "genai_requests", given, python=str(genai_builder.PYTHON)
        )
    return Worker("tools.serve_sides", "served", given)


def summary(
    name: str, runs: Mapping[str, Sequence[RunReport]], busiest: float | None
) -> dict[str, Any]:
    """Figures of all sides, ratios of tokens/s, and what keeps them from meaning anything."""
    speeds = {side: [run.speed for run in own] for side, own in runs.items()}
    economies = {side: [run.economy or 0.0 for run in own] for side, own in runs.items()}
    problems = []
    if busiest is None or busiest > BUSY:
        shown = "unknown" if busiest is None else f"{busiest:.0%} of the processors"
        problems.append(f"the machine has other work ({shown})")
    control = control_by_processor = None
    if {"engine", "control"} <= speeds.keys():
        control = ratio(speeds["control"], speeds["engine"])
        control_by_processor = ratio(economies["control"], economies["engine"])
        if max(abs(control.low - 1), abs(control.high - 1)) > NOISE:
            problems.append(f"the control is {control}")
    else:
        problems.append("there is no control")
    same = {}
    for side in ("control", "http", "genai"):
        if side in runs and "engine" in runs:
            pairs = list(zip(runs[side][LAST].texts, runs["engine"][LAST].texts, strict=True))
            same[side] = sum(a == b for a, b in pairs) / len(pairs)
            if side != "genai" and same[side] < 1:
                problems.append(f"{side} gives other texts than the engine")
    ratios = []
    for goal in GOALS:
        if {goal.side, goal.over} <= speeds.keys():
            found = ratio(speeds[goal.side], speeds[goal.over])
            met = None if problems else found.median >= goal.least
            by_processor = ratio(economies[goal.side], economies[goal.over])
            ratios.append(
                {
                    **asdict(goal),
                    "ratio": asdict(found),
                    "of_processor_time": asdict(by_processor),
                    "met": met,
                }
            )
    sides = {
        side: {
            "tokens_per_second": statistics.median(speeds[side]),
            "tokens_per_processor_second": statistics.median(economies[side]),
            "first_token_ms": percentiles([s for run in own for s in run.first]),
            "inter_token_ms": percentiles([s for run in own for s in run.between]),
            "outside_of_the_graph": statistics.median(known) if known else None,
        }
        for side, own in runs.items()
        for known in [[run.outside for run in own if run.outside is not None]]
    }
    return {
        "bundle": name,
        "sides": sides,
        "control": None if control is None else asdict(control),
        "control_of_processor_time": (
            None if control_by_processor is None else asdict(control_by_processor)
        ),
        "same_texts": same,
        "ratios": ratios,
        "busiest": busiest,
        "not_concluded": problems,
    }


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """The tables."""
    head = "| bundle | side | tokens/s | tokens/processor s | first token p50 / p99, ms |"
    lines = [
        f"{head} between tokens p50 / p99, ms | outside of the graph |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        for side, own in report["sides"].items():
            first, between = own["first_token_ms"], own["inter_token_ms"]
            outside = own["outside_of_the_graph"]
            lines.append(
                f"| {report['bundle']} | {side} | {own['tokens_per_second']:.1f} |"
                f" {own['tokens_per_processor_second']:.1f} |"
                f" {first[0]:.0f} / {first[1]:.0f} | {between[0]:.0f} / {between[1]:.0f} |"
                f" {'–' if outside is None else f'{outside:.0%}'} |"
            )
    lines += ["", "| bundle | ratio | of tokens/s | of tokens/processor s | goal | met |"]
    lines.append("|---|---|---|---|---|---|")
    for report in reports:
        if report["control"] is not None:
            lines.append(
                f"| {report['bundle']} | control | {Ratio(**report['control'])} |"
                f" {Ratio(**report['control_of_processor_time'])} | 1 | |"
            )
        for row in report["ratios"]:
            met = {None: "not concluded", True: "yes", False: "no"}[row["met"]]
            lines.append(
                f"| {report['bundle']} | {row['side']} / {row['over']} | {Ratio(**row['ratio'])} |"
                f" {Ratio(**row['of_processor_time'])} | ≥ {row['least']} | {met} |"
            )
        same = ", ".join(f"{side} {part:.0%}" for side, part in report["same_texts"].items())
        lines += ["", f"{report['bundle']}: texts equal to the engine's: {same}."]
        if report["not_concluded"]:
            why = "; ".join(report["not_concluded"])
            lines.append(f"Nothing is concluded of {report['bundle']}: {why}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
