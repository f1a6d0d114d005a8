"""Measure chunked prefill of a prompt of 512 tokens: processor time relative to a single run.

    python -m tools.bench_parts BUNDLE ADAPTER [--rounds 3]

Everything runs in one process, with one thread and in random order; the whole prompt is measured
twice, as the control.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

import loradeploy as ld
from loradeploy.runtime.decoding.caches import parts
from loradeploy.runtime.decoding.caches.rows import CachedRows
from loradeploy.runtime.decoding.graph import DecoderGraph
from tools.timing.alternate import ratio

_TOKENS: Final = 512
_PARTS: Final = {"whole": 512, "control": 512, "256": 256, "128": 128, "64": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = ld.AdapterSession(arguments.bundle, session_options=options)
    session.load("one", arguments.adapter)
    graph = DecoderGraph.of(session, 0)
    ids = np.random.default_rng(0).integers(0, session.limits.vocabulary or 1000, (1, _TOKENS))
    sides = [(part, use) for part in _PARTS for use in (None, "one")]
    seconds: dict[Any, list[float]] = {side: [] for side in sides}
    for number in range(arguments.rounds + 1):
        for part, use in random.sample(sides, len(sides)):
            parts.TOKENS = _PARTS[part]  # type: ignore[misc]
            with session.hold([use]) as held:
                begin = time.process_time()
                CachedRows(graph, 1).read(held, ids, np.ones_like(ids), np.array([-1]))
                taken = time.process_time() - begin
            if number:  # the first round warms up
                seconds[part, use].append(taken)
    for (part, use), taken_by in seconds.items():
        found = ratio(taken_by, seconds["whole", use])
        print(f"{part}, {'idle' if use is None else 'one'}: {found}")


if __name__ == "__main__":
    main()
