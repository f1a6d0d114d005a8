"""Measure chunked prefill of a prompt of 512 tokens: processor time relative to a single run.

    python -m tools.bench_parts BUNDLE ADAPTER [--merged BUNDLE] [--operator FILE] [--rounds 3]

Everything runs in one process, with one thread and in random order; the whole prompt is measured
twice, as the control. `--merged`: a bundle with the same adapter merged, exported with
`--logits-to-keep`; the adapter as side inputs is compared with it, both in the same parts.
`--operator`: the operators' library, for the bundles that were exported for it.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import onnxruntime

import loradeploy as ld
from loradeploy.bundle.manifest import read_manifest
from loradeploy.runtime.decoding.caches import parts
from loradeploy.runtime.decoding.caches.rows import CachedRows
from loradeploy.runtime.decoding.graph import DecoderGraph, NewTokens
from tools.timing.alternate import ratio

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TOKENS: Final = 512
_PARTS: Final = {"whole": 512, "control": 512, "256": 256, "128": 128, "64": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--merged", type=Path)
    parser.add_argument("--operator", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    session = _open(arguments.bundle, arguments.operator)
    session.load("one", arguments.adapter)
    runs = {"idle": (session, None), "one": (session, "one")}
    if arguments.merged is not None:
        runs["merged"] = (_open(arguments.merged, arguments.operator), None)
    ids = np.random.default_rng(0).integers(0, session.limits.vocabulary or 1000, (1, _TOKENS))
    sides = [(part, run) for part in _PARTS for run in runs]
    seconds: dict[tuple[str, str], list[float]] = {side: [] for side in sides}
    for number in range(arguments.rounds + 1):
        for part, run in random.sample(sides, len(sides)):
            parts.TOKENS = _PARTS[part]  # type: ignore[misc]
            taken = _prefill(*runs[run], ids)
            if number:  # the first round warms up
                seconds[part, run].append(taken)
    for (part, run), taken_by in seconds.items():
        print(f"{part}, {run} / whole: {ratio(taken_by, seconds['whole', run])}")
        if run == "one" and arguments.merged is not None:
            print(f"{part}, one / merged: {ratio(taken_by, seconds[part, 'merged'])}")


def _open(bundle: Path, operator: Path | None) -> ld.AdapterSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not read_manifest(bundle).operators:
        operator = None
    return ld.AdapterSession(bundle, session_options=options, operator=operator)


def _prefill(session: ld.AdapterSession, adapter: str | None, ids: NDArray[np.int64]) -> float:
    """Return the processor time of a prefill."""
    graph = DecoderGraph.of(session, 0)
    with session.hold([adapter]) as held:
        begin = time.process_time()
        CachedRows(graph, 1).read(held, NewTokens(ids, np.ones_like(ids), np.array([-1])))
        return time.process_time() - begin


if __name__ == "__main__":
    main()
