"""Compare a batch with adapters of different ranks to one with adapters of their mean rank.

    python -m tools.bench_ranks BUNDLE [--operator FILE]

Measures a decode step of eight rows with eight adapters, after 128 tokens. All factors in a batch
are padded to the largest rank; the ratio is the cost of this padding. With the operator's library,
nothing is read beyond the rank of a row. Two processes have equal
ranks, one of them as the control, and one mixed ranks; they take turns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import loradeploy as ld
from loradeploy.runtime.timing import forward
from tools.inputs.made_adapters import make_adapters
from tools.timing.alternate import Side, Worker, in_processes, ratio, serve_worker

PAST: Final = 128
# The ranks of the rows, and their mean.
MIXTURES: Final = {
    "one of 64 among 8": ((64, 8, 8, 8, 8, 8, 8, 8), 15),
    "from 4 to 64": ((4, 8, 8, 16, 16, 16, 28, 64), 20),
}


def step(bundle: str, ranks: Sequence[int], operator: str | None = None) -> Side:
    """Return a step with one row per rank, each with a random adapter of that rank."""
    session = ld.AdapterSession(bundle, operator=operator)
    names = [f"rank-{number}" for number in range(len(ranks))]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, rank) in enumerate(zip(names, ranks, strict=True)):
            made = make_adapters(Path(bundle), Path(scratch) / name, 1, rank=rank, seed=number)
            (place,) = made.values()
            session.load(name, place)
    return partial(forward(session, len(ranks), past=PAST, new=1), names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--operator", help="the operator's library, for a bundle exported for it")
    parser.add_argument("--starts", type=int, default=3, help="sets of fresh processes")
    parser.add_argument("--rounds", type=int, default=4, help="turns of a side in each set")
    arguments = parser.parse_args()

    def worker(ranks: Sequence[int]) -> Worker:
        given = {
            "bundle": str(arguments.bundle),
            "ranks": ranks,
            "operator": arguments.operator,
        }
        return Worker("tools.bench_ranks", "step", given)

    for name, (ranks, mean) in MIXTURES.items():
        equal = (mean,) * len(ranks)
        sides = [partial(worker, side) for side in (equal, equal, ranks)]
        even, control, mixed = in_processes(
            sides, starts=arguments.starts, rounds=arguments.rounds, calls=5
        )
        print(f"{name} / eight of {mean}: {ratio(mixed, even)}, control {ratio(control, even)}")


if __name__ == "__main__" and not serve_worker({"step": step}):
    main()
