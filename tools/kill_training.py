"""Kill training runs at random points, and verify that resumed runs end with the same adapter.

    python -m tools.kill_training --runs 20 --seed 0

A run is killed once or twice: by SIGKILL or SIGTERM after a random time, or at or shortly after a
random file operation (open, rename, remove). Then it is resumed to its end, or started again if
there is nothing to resume. The digest and the loss curve of the adapter must equal those of a run
that was not killed, and no files may be left in its parent directory. Otherwise a finding is
reported, and the exit status is 1.

The libraries are imported once, and every run is a fork of that process.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tools.inputs.tiny_llama import tiny_llama

# Sets of options, which differ in how a step is computed and when a run ends.
_STEPS: Final = ("--max-steps", "12")
SETTINGS: Final[tuple[tuple[str, ...], ...]] = (
    (*_STEPS, "--dropout", "0.1"),
    (*_STEPS, "--gradient-accumulation", "2", "--use-dora"),
    (
        *_STEPS,
        *("--eval-steps", "3", "--validation-split", "0.25", "--learning-rate", "0.5"),
        *("--keep-best", "--early-stopping", "2"),
    ),
    ("--group-by-length", "--lora-plus-ratio", "4", "--epochs", "5"),
)
_COMMON: Final = ("--batch-size", "4", "--rank", "4", "--save-steps", "2")
_KINDS: Final = ("file", "time", "term")
_FILE_EVENTS: Final = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
_SHORTLY: Final = 0.004  # seconds
_KILLED: Final = (-signal.SIGKILL, -signal.SIGALRM, 128 + signal.SIGTERM, -signal.SIGTERM)
_IMPORTED: Final = (
    *("loradeploy.train.job", "loradeploy.cli.train", "transformers.models.llama.modeling_llama"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
)


@dataclass
class Child:
    """A run of the command in a child process, and how it ended."""

    status: int
    said: str
    seconds: float
    events: int


@dataclass
class Figures:
    """Counts of runs and kills, and the findings."""

    runs: int = 0
    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: list[str] = field(default_factory=list)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", type=Path, help="a model directory [default: a tiny random model]"
    )
    parser.add_argument("--data", type=Path, help="training data [default: a few examples]")
    given = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        model = given.model or tiny_llama(here / "model")
        data = given.data or examples(here / "data.jsonl")
        figures = kill_runs(model, data, here, given.runs, given.seed)
    print(
        json.dumps(
            {
                "runs": figures.runs,
                "kills": dict(sorted(figures.kills.items())),
                "findings": figures.findings,
                "seconds": round(time.monotonic() - begin, 1),
            },
            indent=2,
        )
    )
    return 1 if figures.findings else 0


def kill_runs(model: Path, data: Path, place: Path, runs: int, seed: int) -> Figures:
    """Kill and resume `runs` training runs of `model` on `data`, in the directory `place`."""
    import torch

    for module in _IMPORTED:
        importlib.import_module(module)
    torch.set_num_threads(1)
    gc.freeze()  # so that garbage collections in the children skip all imported objects
    chance, figures = random.Random(seed), Figures(runs=runs)
    whole: dict[int, tuple[Path, Child]] = {}
    for number in range(runs):
        index = number // len(_KINDS) % len(SETTINGS)
        line = ["train", "--model", str(model), "--data", str(data), *_COMMON, *SETTINGS[index]]
        if index not in whole:
            output = place / f"whole-{index}" / "adapter"
            whole[index] = output, _child([*line, "--output", str(output)])
            if whole[index][1].status:
                raise RuntimeError(f"a run that was not killed fails: {whole[index][1].said}")
        expected, undisturbed = whole[index]
        output = place / f"run-{number}" / "adapter"
        line += ["--output", str(output)]
        kinds = [_KINDS[number % len(_KINDS)]]
        if number >= len(_KINDS) and chance.random() < 0.5:
            kinds.append(chance.choice(_KINDS))
        problem = _run(line, output, kinds, undisturbed, chance, figures.kills)
        problem = problem or _difference(output, expected)
        if problem:
            figures.findings.append(f"run {number} ({', '.join(kinds)}): {problem}")
    return figures


def _run(
    line: list[str],
    output: Path,
    kinds: list[str],
    undisturbed: Child,
    chance: random.Random,
    kills: collections.Counter[str],
) -> str | None:
    """Run `line` with a kill of each of `kinds`, then to its end; return a problem, or None."""
    resume: list[str] = []
    for kind in kinds:
        share = chance.random()
        number = signal.SIGTERM if kind == "term" else signal.SIGKILL
        child = None
        while child is None or child.status not in _KILLED:
            if child is not None:  # the previous run had no checkpoint to resume, or completed
                if child.status and not _nothing(child):
                    return f"exit status {child.status}: {child.said}"
                shutil.rmtree(output, ignore_errors=True)
                resume, share = [], share / 2
            if kind == "file":
                event = 1 + int(share * undisturbed.events)
                child = _child([*line, *resume], event=event, later=chance.random())
            else:
                after = share * undisturbed.seconds
                child = _child([*line, *resume], after=after, number=number)
        kills[kind] += 1
        kills["inside a write"] += any(output.parent.glob("**/.*.partial"))
        resume = ["--resume"]
    child = _child([*line, *resume])
    if _nothing(child) and not output.exists():
        kills["before the first checkpoint"] += 1
        child = _child(line)
    if child.status and not (_nothing(child) and output.exists()):
        return f"resumed, exit status {child.status}: {child.said}"
    return None


def _nothing(child: Child) -> bool:
    return child.status == 2 and "nothing to resume" in child.said


def _difference(output: Path, expected: Path) -> str | None:
    """Return how `output` differs from the adapter `expected`; None if it does not."""
    from loradeploy.adapter import load_adapter

    found, right = load_adapter(output).digest, load_adapter(expected).digest
    if found != right:
        return f"the digest is {found}, of the run that was not killed {right}"
    if (output / "loss.csv").read_bytes() != (expected / "loss.csv").read_bytes():
        return "the loss curve differs"
    left = sorted(path.name for path in output.parent.iterdir() if path != output)
    return f"left behind: {', '.join(left)}" if left else None


def _child(
    line: list[str], *, after: float = 0, number: int = 0, event: int = 0, later: float = 0
) -> Child:
    """Run the command line in a fork; send it the signal `number` `after` seconds, or kill it at
    the file operation `event`.
    """
    output = Path(line[line.index("--output") + 1])
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        said, counted = Path(place, "said"), Path(place, "counted")
        begin = time.monotonic()
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            _become(line, output.parent, said, counted, event, later * _SHORTLY)
        if number:
            time.sleep(after)
            os.kill(process, number)
        _, status = os.waitpid(process, 0)
        return Child(
            status=os.waitstatus_to_exitcode(status),
            said=said.read_text(encoding="utf-8").strip() if said.exists() else "",
            seconds=time.monotonic() - begin,
            events=int(counted.read_text()) if counted.exists() else 0,
        )


def _become(
    line: list[str], watched: Path, said: Path, counted: Path, event: int, later: float
) -> None:
    """Run the command line and exit; die at the `event`-th file operation below `watched`."""
    from loradeploy.cli.main import main as command

    code = 70
    try:
        stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        count = 0

        def count_files(name: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if name not in _FILE_EVENTS or not _is_below(watched, arguments):
                return
            count += 1
            if count == event:
                # A timer, so that the process dies not only between system calls.
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, max(later, 1e-6))

        sys.addaudithook(count_files)
        command(line)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            counted.write_text(str(count))
        os._exit(code)


def _is_below(place: Path, arguments: tuple[Any, ...]) -> bool:
    name = arguments[0]
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    # rmtree passes names relative to a directory's file descriptor, without a slash.
    return isinstance(name, str) and (name.startswith(str(place)) or "/" not in name)


def examples(file: Path) -> Path:
    """Write sixteen prompts of different lengths with completions."""
    rows = [{"prompt": f"Q{'!' * n} {n}:", "completion": f" {n % 3}."} for n in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


if __name__ == "__main__":
    sys.exit(main())
