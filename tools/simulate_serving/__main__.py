"""Plan the capacity of nodes that serve many adapters, by a simulation based on measurements.

    python -m tools.simulate_serving --measure BUNDLE --adapter NAME=DIR … --figures figures.json
    python -m tools.simulate_serving --check BUNDLE --adapter NAME=DIR … --clients 8
    python -m tools.simulate_serving --figures figures.json --nodes 2 4 8 --adapters 1000 --rate 20

The first command measures one node and writes the figures. The second compares the simulation with
two real replicas. The third simulates clusters. docs/scaling.md explains the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from tools.simulate_serving.measure import compared, measured, two_replicas
from tools.simulate_serving.model import (
    ROUTINGS,
    Cluster,
    Figures,
    Load,
    quantile,
    simulate,
)


def read_figures(file: str) -> Figures:
    """Read the figures in a JSON file."""
    values: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    step = {int(rows): float(seconds) for rows, seconds in values.pop("step").items()}
    pairs: dict[str, Any] = {name: tuple(values.pop(name)) for name in ("prefill", "load")}
    return Figures(step=step, **pairs, **values)


def plan(figures: Figures, load: Load, cluster: Cluster) -> dict[str, float | int | str]:
    """Simulate a cluster, and return a row of the table."""
    found = simulate(load, cluster, figures)
    return {
        "nodes": cluster.nodes,
        "cold": cluster.cold,
        "routing": cluster.routing,
        "tokens/s": round(found.rate, 1),
        "first token p50": round(quantile(found.first, 0.5), 3),
        "p99": round(quantile(found.first, 0.99), 3),
        "between tokens p50": round(quantile(found.between, 0.5), 4),
        "adapters found": round(found.hits / (found.hits + found.loads), 3),
        "busy": round(found.busy, 2),
        "cost of 1M tokens": round(found.cost(cluster), 3),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.simulate_serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--figures", help="the JSON file of figures")
    parser.add_argument(
        "--measure", metavar="BUNDLE", help="measure a node, and write the file of --figures"
    )
    parser.add_argument(
        "--check", metavar="BUNDLE", help="compare the simulation with two replicas"
    )
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument(
        "--prompts", type=int, nargs=2, default=(16, 96), help="two prompt lengths to measure"
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[2], help="numbers of nodes")
    parser.add_argument("--rows", type=int, default=8, help="--max-rows of a node")
    parser.add_argument("--memory-mib", type=float, help="memory for adapters per node")
    parser.add_argument("--routing", nargs="+", default=["sticky"], choices=list(ROUTINGS))
    parser.add_argument(
        "--cold", type=int, default=0, help="number of nodes that start with the first request"
    )
    parser.add_argument("--price", type=float, default=1.0, help="price of a node per hour")
    for item in dataclasses.fields(Load):
        if item.name in ("spread", "ranks"):
            continue
        kind = type(item.default)
        parser.add_argument(f"--{item.name}", type=kind, default=item.default)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(Load().ranks))
    given = parser.parse_args()
    adapters = dict(pair.split("=", 1) for pair in given.adapter)
    if not (given.figures or given.check):
        sys.exit("give --figures")
    if given.measure:
        figures = measured(given.measure, adapters, given.rows, tuple(given.prompts))
        Path(given.figures).write_text(json.dumps(dataclasses.asdict(figures), indent=2) + "\n")
        print(json.dumps(dataclasses.asdict(figures), indent=2))
        return
    names = [item.name for item in dataclasses.fields(Load) if item.name not in ("spread", "ranks")]
    load = Load(**{name: getattr(given, name) for name in names}, ranks=tuple(given.ranks))
    if bool(load.rate) == bool(load.clients):
        sys.exit("give --rate or --clients")
    if given.check:
        load = dataclasses.replace(load, adapters=len(adapters), spread=False, rate=0.0)
        real = two_replicas(given.check, adapters, given.rows, load)
        # The replicas share this machine, so the figures are measured with two nodes as well.
        figures = measured(given.check, adapters, given.rows, tuple(given.prompts), nodes=2)
        again = two_replicas(given.check, adapters, given.rows, load)
        found = simulate(load, Cluster(rows=given.rows), figures)
        print(json.dumps(compared(real, again, found), indent=2))
        return
    figures = read_figures(given.figures)
    memory = float("inf") if given.memory_mib is None else given.memory_mib * 2**20
    if not 0 <= given.cold < min(given.nodes):
        sys.exit("--cold: at least one node must be running at the start")
    rows = [
        plan(figures, load, Cluster(nodes, given.rows, memory, routing, given.cold, given.price))
        for nodes in given.nodes
        for routing in given.routing
    ]
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
