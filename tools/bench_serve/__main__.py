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
    OpenVINO GenAI    the same requests in batches of one adapter, all of an adapter's at once
    llama.cpp         the same in llama.cpp, which batches requests of one adapter too
    thousand          the engine, 1,000 registered small adapters by Zipf's law, room for 32
    eight small       the engine, eight of these

The last two need environments of their own (`tools/bench_peers/engines.py`), and a bundle whose
name is its precision. Each side is a process; they take turns in random order, one at a time.
Ratios are taken round by round. Nothing is concluded where the machine has other work, the control
is not near 1, or a side of the same requests gives other texts.

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
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.conversion import convert
from loradeploy.files import atomic_file, write_json
from tools.bench_peers.engines import (
    PEERS,
    PRECISIONS,
    Pythons,
    add_pythons,
    peer_sides,
    pythons_of,
    start_peer,
)
from tools.bench_serve.costs import cost_markdown, measure_costs
from tools.bench_serve.latency import draw, load_markdown, measure_load
from tools.bench_serve.load import traffic, zipf
from tools.bench_serve.report import markdown, summary
from tools.bench_serve.sides import RunReport
from tools.inputs import genai_builder
from tools.inputs.made_adapters import make_adapters
from tools.inputs.real_models import cache, smollm2
from tools.timing.alternate import BUSY, Worker, busy

console = Console(stderr=True, highlight=False)

ADAPTERS: Final = 8
RANK: Final = 16  # of these, on all linear layers
REGISTERED: Final = 1000
ROOM: Final = 32


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
    add_pythons(parser)
    parser.add_argument("--draw", type=Path, metavar="JSON", help="draw what --load wrote")
    arguments = parser.parse_args()
    if arguments.draw is not None:
        report = json.loads(arguments.draw.read_text(encoding="utf-8"))
        draw(report, arguments.draw.with_suffix(".svg"))
        return
    if not arguments.bundle:
        parser.error("give --bundle NAME=DIR")
    if arguments.rounds < 2:
        parser.error("--rounds: expected at least 2, which quartiles need")
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
    tokenizer = Tokenizer(bundle)
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
        sorted(tokenizer.eos_ids),  # barred, so that all sides generate as many tokens
        arguments.load,
        arguments.seconds,
    )
    return {"rows": arguments.clients, "tokens": arguments.tokens, **found}


def costs_of(bundle: Path, arguments: Any, scratch: Path) -> dict[str, Any]:
    """What a step takes of the processor, of the engine and over HTTP."""
    tokenizer = Tokenizer(bundle)
    load = traffic(max(arguments.costs), 1, arguments.tokens, tokenizer, 0)
    given = {
        "bundle": str(bundle),
        "adapters": make_adapters(bundle, scratch / "a", ADAPTERS, rank=RANK),
        "prompts": [own for (own,) in load.prompts],
        "asked": [f"a{number % ADAPTERS}" for number in range(max(arguments.costs))],
        "tokens": load.tokens,
        "ends": sorted(tokenizer.eos_ids),
    }
    return {"costs": measure_costs(given, arguments.costs, arguments.rounds)}


def small_adapters(bundle: Path, scratch: Path, count: int) -> dict[str, str]:
    """Adapters of which there can be many."""
    return make_adapters(bundle, scratch / "small", count, rank=4, modules=("q_proj", "v_proj"))


def measure(name: str, bundle: Path, arguments: Any, scratch: Path) -> dict[str, Any]:
    """All sides on one bundle, in turns."""
    tokenizer = Tokenizer(bundle)
    pythons = pythons_of(arguments)
    given = _arguments(name, bundle, tokenizer, arguments, scratch)
    idle = busy()
    console.print(f"{name}: starting {', '.join(given)}")
    workers: dict[str, Worker] = {}
    runs: dict[str, list[RunReport]] = {side: [] for side in given}
    work = [] if idle is None else [idle]
    try:
        for side, own in given.items():
            workers[side] = _start(side, own, pythons)
        for number in range(arguments.rounds):
            order = list(workers)
            random.Random(number).shuffle(order)
            for side in order:
                if (other := busy(0.5)) is not None:
                    work.append(other)
                (found,) = workers[side].results(1)
                report = RunReport(**found)
                report.texts = report.texts or [tokenizer.decode(own) for own in report.tokens]
                runs[side].append(report)
            console.print(f"{name}: round {number + 1} of {arguments.rounds}")
    finally:
        for worker in workers.values():
            worker.close()
    return summary(name, runs, max(work, default=None))


def _arguments(
    name: str, bundle: Path, tokenizer: Tokenizer, arguments: Any, scratch: Path
) -> dict[str, dict[str, Any]]:
    """What each side's process is given, of the sides that were chosen."""
    chosen = None if arguments.sides is None else arguments.sides.split(",")
    load = traffic(arguments.clients, arguments.requests, arguments.tokens, tokenizer, 0)
    adapters = make_adapters(bundle, scratch / "a", ADAPTERS, rank=RANK)
    common = {
        "bundle": str(bundle),
        "prompts": load.prompts,
        "tokens": load.tokens,
        "ends": sorted(tokenizer.eos_ids),
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
    pythons = pythons_of(arguments)
    if name in PRECISIONS:
        place = cache() / "peers"
        place.mkdir(parents=True, exist_ok=True)
        found = peer_sides(name, smollm2(), adapters, pythons, place, scratch)
        sides |= {side: {**own, **peer} for side, peer in found.items()}
    elif pythons != Pythons(None, None, None):
        raise SystemExit(f"--bundle {name}=…: a peer needs one of {', '.join(PRECISIONS)} as name")
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


def _start(side: str, given: Mapping[str, Any], pythons: Pythons) -> Worker:
    if side == "genai":
        return Worker(
            "tools.timing.genai_sides", "genai_requests", given, python=str(genai_builder.PYTHON)
        )
    if side in PEERS:
        return start_peer(side, "requests", given, pythons)
    return Worker("tools.bench_serve.sides", "served", given)


if __name__ == "__main__":
    main()
