"""Measure time and memory of a prefill with logits of all positions, and of the last one only.

    python -m tools.bench_prefill BUNDLE

Two processes compute all positions, one of them as the control, and one the last position; they
take turns. Memory is the peak of a run of eight prompts minus the memory before it (Linux).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import loradeploy as ld
from loradeploy.bundle.names import LOGITS_TO_KEEP
from loradeploy.bundle.sample import Sample
from tools.timing.alternate import Side, Worker, in_processes, ratio, serve_worker

TOKENS = 512
ROWS = 8  # rows of the run whose memory is measured


def prefill(bundle: str, rows: int, last: bool) -> Side:
    """Return a run of `rows` prompts; with several rows, it reports its memory in MB."""
    session = ld.AdapterSession(bundle)
    feeds: dict[str, Any] = dict(Sample(session.manifest.inputs, {}).feeds(rows, TOKENS))
    cache = session.empty_cache(rows)
    feeds.update(cache.inputs)
    if last:
        feeds[LOGITS_TO_KEEP] = np.array([[-1]])

    def run() -> None:
        cache.make_room(TOKENS, TOKENS)
        feeds.update(cache.inputs)
        names = (session.manifest.outputs[0].name, *cache.outputs)
        session.run_with_ort_values(names, feeds, buffers=cache.buffers)

    def measured() -> dict[str, int]:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _kilobytes("VmRSS")
        run()
        return {"megabytes": (_kilobytes("VmHWM") - before) // 1024}

    return run if rows == 1 else measured


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--starts", type=int, default=4, help="sets of fresh processes")
    parser.add_argument("--rounds", type=int, default=3, help="turns of a side in each set")
    arguments = parser.parse_args()

    def worker(rows: int, last: bool) -> Worker:
        given = {"bundle": str(arguments.bundle), "rows": rows, "last": last}
        return Worker("tools.bench_prefill", "prefill", given)

    sides = [lambda last=last: worker(1, last) for last in (False, False, True)]
    every, control, last = in_processes(
        sides, starts=arguments.starts, rounds=arguments.rounds, calls=2
    )
    print(f"prefill of {TOKENS}, the last position / all: {ratio(last, every)}")
    print(f"control: {ratio(control, every)}")
    for kept in (False, True):
        process = worker(ROWS, kept)
        ((found),) = process.results(1)
        process.close()
        what = "the last position" if kept else "all positions"
        print(f"{ROWS} × {TOKENS}, {what}: {found['megabytes']} MB")


if __name__ == "__main__" and not serve_worker({"prefill": prefill}, warm_up=0):
    main()
