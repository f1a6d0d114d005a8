"""Benchmark serving many clients and adapters: tokens/s, time to first token and between tokens.

    python -m tools.bench_serve --bundle fp32=DIR --bundle int4=DIR --output build/bench

A bundle is one of SmolLM2, exported with `loradeploy export --attention gqa --layout rows`. Sixteen
clients each send a new request when the previous one is answered. Decoding is greedy, with a fixed
length, so that every side generates the same number of tokens for the same prompts:

    engine            the engine, eight adapters, each client has one of them
    control           the same as `engine`, in another process
    one adapter       the engine, one adapter for all clients
    http              the server over HTTP, streaming, eight adapters
    genai             the same requests in onnxruntime-genai, one by one, switching adapters
    OpenVINO GenAI    the same requests in batches of one adapter, all of an adapter at once
    llama.cpp         the same in llama.cpp, which also batches requests of one adapter only
    thousand          the engine, 1,000 registered small adapters, Zipf distribution, room for 32
    eight small       the engine, eight of these small adapters

OpenVINO GenAI and llama.cpp need their own environments (`tools/bench_peers/engines.py`), and a
bundle whose name is its precision. Each side is a process; they take turns in random order, one at
a time, and ratios are computed within each round. No conclusion is drawn if the machine is busy
with other work, the control is not near 1, or a side returns other texts for the same requests.

    --load 0.25 0.5 …   instead, measure latency against load over HTTP, for `thousand` and
                        `eight small`
    --costs 1 8 16      instead, measure processor time of a step with this many rows, in the graph
                        and outside of it
    --draw FILE.json    only draw the chart of a report of --load
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
REGISTERED: Final = 1000
ROOM: Final = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--bundle", action="append", default=[], metavar="NAME=DIR", help="repeat for more"
    )
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="for the reports")
    parser.add_argument("--sides", help="run only these sides, separated by commas")
    parser.add_argument("--clients", type=int, default=16, help="concurrent clients")
    parser.add_argument("--requests", type=int, default=2, help="requests per client and round")
    parser.add_argument("--tokens", type=int, default=32, help="generated tokens per request")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side")
    parser.add_argument(
        "--rank", type=int, default=16, help="of the eight adapters, on all linear layers"
    )
    parser.add_argument(
        "--operator", metavar="FILE", help="the operator's library, for bundles exported for it"
    )
    parser.add_argument(
        "--registered", type=int, default=REGISTERED, help="registered small adapters"
    )
    parser.add_argument(
        "--load",
        type=float,
        nargs="+",
        metavar="PART",
        help="measure latency at these parts of the highest request rate",
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="duration of a rate of --load")
    parser.add_argument(
        "--costs",
        type=int,
        nargs="+",
        metavar="ROWS",
        help="measure the processor time of steps with these numbers of rows",
    )
    add_pythons(parser)
    parser.add_argument(
        "--draw", type=Path, metavar="JSON", help="only draw the chart of this report of --load"
    )
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
        "rank": arguments.rank,
        "results": reports,
    }
    write_json(arguments.output / "serve.json", result)
    text = markdown(reports)
    with atomic_file(arguments.output / "serve.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)
    sys.exit(any(report["not_concluded"] for report in reports))


def _measure_apart(arguments: Any) -> None:
    """Run the measurements of --load or --costs on each bundle."""
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
            print(f"The machine has other work: nothing is concluded about {name}.")


def load_of(bundle: Path, arguments: Any, scratch: Path) -> dict[str, Any]:
    """Measure latency against load, with few small adapters that fit in memory, and with many."""
    tokenizer = Tokenizer(bundle)
    small = small_adapters(bundle, scratch, arguments.registered)

    def prompt(number: int) -> list[int]:
        ((own,),) = traffic(1, 1, arguments.tokens, tokenizer, number).prompts
        return own

    names = list(small)
    few = {name: small[name] for name in names[:ADAPTERS]}
    # No request is refused when the server is overloaded, so that all are measured.
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
        sorted(tokenizer.eos_ids),  # excluded, so that all sides generate the same number of tokens
        arguments.load,
        arguments.seconds,
    )
    return {"rows": arguments.clients, "tokens": arguments.tokens, **found}


def costs_of(bundle: Path, arguments: Any, scratch: Path) -> dict[str, Any]:
    """Measure the processor time of a step, in the engine and over HTTP."""
    tokenizer = Tokenizer(bundle)
    load = traffic(max(arguments.costs), 1, arguments.tokens, tokenizer, 0)
    given = {
        "bundle": str(bundle),
        "adapters": make_adapters(bundle, scratch / "a", ADAPTERS, rank=arguments.rank),
        "prompts": [own for (own,) in load.prompts],
        "asked": [f"a{number % ADAPTERS}" for number in range(max(arguments.costs))],
        "tokens": load.tokens,
        "ends": sorted(tokenizer.eos_ids),
    }
    return {"costs": measure_costs(given, arguments.costs, arguments.rounds)}


def small_adapters(bundle: Path, scratch: Path, count: int) -> dict[str, str]:
    """Make `count` small adapters."""
    return make_adapters(bundle, scratch / "small", count, rank=4, modules=("q_proj", "v_proj"))


def measure(name: str, bundle: Path, arguments: Any, scratch: Path) -> dict[str, Any]:
    """Measure all sides on one bundle; they take turns."""
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
    """Return the arguments of each chosen side's process."""
    chosen = None if arguments.sides is None else arguments.sides.split(",")
    load = traffic(arguments.clients, arguments.requests, arguments.tokens, tokenizer, 0)
    adapters = make_adapters(bundle, scratch / "a", ADAPTERS, rank=arguments.rank)
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
    library = {} if arguments.operator is None else {"operator": arguments.operator}
    sides: dict[str, dict[str, Any]] = {
        "engine": {**own, **library},
        "control": {**own, **library},
        "one adapter": {**own, **library, "asked": [["a0" for _ in requests] for _ in clients]},
        "http": {**own, **library, "http": True},
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
        own = {**common, **library, "room": ROOM}
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
