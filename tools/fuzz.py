"""Fuzz all readers for a given time, in a child process that may crash.

    python -m tools.fuzz                                   a minute for each reader
    python -m tools.fuzz --reader adapter --seconds 600 --seed 1
    python -m tools.fuzz --reader adapter --seed 1 --index 4711      repeat one try

Prints the numbers of executions and findings by reader; the exit status is 1 if there are findings.
A try depends on reader, seed and index only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Final

from tools.fuzzing.readers import READERS, Finding, Seeds, attempt

# A try that takes longer is a finding. Exports of graphs take some tenths of a second.
_SLOW_SECONDS: Final = 60
_SHOWN: Final = 40


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--reader", choices=READERS, action="append", help="fuzz this reader [default: all]"
    )
    parser.add_argument("--seconds", type=float, default=60, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, help="repeat this try of the first reader")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("RUST_BACKTRACE", "0")
    names = options.reader or list(READERS)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        from tools.fuzzing.seeds import make_seeds

        scratch = Path(directory)
        seeds = make_seeds(scratch)
        if options.index is not None:
            return _again(names[0], seeds, scratch / "again", options.seed, options.index)
        found = 0
        for name in names:
            executions, findings = _fuzz(name, seeds, scratch / name, options.seed, options.seconds)
            print(f"{name}: {executions:,} executions, {len(findings)} findings", flush=True)
            for ended, count in Counter(f.ended[:120] for f in findings).most_common(_SHOWN):
                first = next(f for f in findings if f.ended[:120] == ended)
                print(f"    {count} × {first.ended}\n        --index {first.index}: {first.what}")
            found += len(findings)
    return 1 if found else 0


def _again(name: str, seeds: Seeds, scratch: Path, seed: int, index: int) -> int:
    scratch.mkdir()
    reader = READERS[name](seeds, scratch)
    try:
        reader.attempt(Random(f"{seed}/{name}/{index}"))
    finally:
        print(reader.what)
    return 0


def _fuzz(
    name: str, seeds: Seeds, scratch: Path, seed: int, seconds: float
) -> tuple[int, list[Finding]]:
    """Return executions and findings; a child process that crashes or hangs is replaced."""
    end = time.monotonic() + seconds
    start, findings = 0, []
    context = multiprocessing.get_context("spawn")
    while time.monotonic() < end:
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(
            target=_work, args=(name, seeds, scratch, seed, start, end, theirs)
        )
        worker.start()
        theirs.close()
        at, ended = start, "hangs"
        try:
            while ours.poll(_SLOW_SECONDS):
                message = ours.recv()
                if message is None:
                    ended = ""
                    break
                if isinstance(message, int):
                    at = message
                else:
                    findings.append(message)
        except EOFError:
            worker.join()
            ended = f"the process ends with {worker.exitcode}"
        worker.kill()
        worker.join()
        if ended:
            findings.append(Finding(name, at, "", ended))
            at += 1
        start = at
    return start, findings


def _work(
    name: str,
    seeds: Seeds,
    scratch: Path,
    seed: int,
    start: int,
    end: float,
    tell: Connection,
) -> None:
    # Hide the libraries' panic messages and the warnings of exports.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    scratch.mkdir(exist_ok=True)
    reader = READERS[name](seeds, scratch)
    index = start
    while time.monotonic() < end:
        tell.send(index)
        if (finding := attempt(reader, name, seed, index)) is not None:
            tell.send(finding)
        index += 1
    tell.send(index)
    tell.send(None)


if __name__ == "__main__":
    sys.exit(main())
