"""Measure the start of `loradeploy run`: processor time of a whole process for one new token.

    python -m tools.bench_start BUNDLE [BUNDLE…] [--operator FILE] [--tree DIR]

Every process runs on one processor, so that onnxruntime has one thread and none waits for another.
The files are in the page cache after the first round, which is not counted. The processes take
turns in random order. Beside the command: the same with `--tree`, another checkout of loradeploy;
with no module compiled yet; and onnxruntime alone, whose import and opening of the graph from its
files are what no runtime can leave out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tools.timing.alternate import alternate

_PROMPT: Final = "The capital"
_ROUNDS: Final = 5
_ALONE: Final = """
import sys
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
if sys.argv[2:]:
    options.register_custom_ops_library(sys.argv[2])
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
"""


@dataclass(eq=False)
class Process:
    """A command that is run again for each measurement, with the loradeploy in `tree`.

    `modules`: the directory of compiled modules, emptied before each process unless `compiled`.
    `peaks`: MiB of memory at its peak, of each process.
    """

    command: Sequence[str]
    tree: Path
    modules: Path
    compiled: bool = True
    peaks: list[float] = field(default_factory=list)

    def time(self, calls: int) -> list[float]:
        """Seconds of processor time of `calls` processes, one after the other."""
        return [self._run() for _ in range(calls)]

    def _run(self) -> float:
        if not self.compiled:
            shutil.rmtree(self.modules, ignore_errors=True)
        environment = {**os.environ, "PYTHONPATH": os.fspath(self.tree)}
        environment["PYTHONPYCACHEPREFIX"] = os.fspath(self.modules)
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        process = subprocess.Popen(
            self.command,
            cwd=self.tree,
            env=environment,
            stdout=subprocess.DEVNULL,
            preexec_fn=_on_one_processor,
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(self.command)} failed: {process.returncode}")
        self.peaks.append(used.ru_maxrss / 1024)
        return used.ru_utime + used.ru_stime


def _on_one_processor() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def processes(
    bundle: Path, operator: Path | None, trees: Sequence[Path], scratch: Path
) -> dict[str, Process]:
    """Return the processes that are compared for a bundle, by what they do.

    `scratch`: a directory for compiled modules.
    """
    here = Path(__file__).parent.parent
    library = [] if operator is None else ["--operator", os.fspath(operator)]
    command = [sys.executable, "-m", "loradeploy", "run", os.fspath(bundle), _PROMPT]
    command += ["--max-new-tokens", "1", *library]
    alone = [sys.executable, "-c", _ALONE, os.fspath(bundle / "model.onnx"), *library[1:]]
    compiled = scratch / "compiled"
    return {
        "`loradeploy run`": Process(command, here, compiled),
        **{f"the same in {tree.name}": Process(command, tree, compiled) for tree in trees},
        "the same, no module compiled yet": Process(command, here, scratch / "none", False),
        "onnxruntime alone": Process(alone, here, compiled),
    }


def table(results: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Return seconds and peaks by name as a Markdown table."""
    lines = ["| what | s, median | all | MiB at the peak |", "|---|---|---|---|"]
    for name, (seconds, peaks) in results.items():
        spread = f"{min(seconds):.2f}–{max(seconds):.2f}"
        lines.append(
            f"| {name} | {statistics.median(seconds):.2f} | {spread} |"
            f" {statistics.median(peaks):.0f} |"
        )
    return "\n".join(lines)


def measure(sides: Mapping[str, Process], rounds: int) -> str:
    """Return the table of `sides`, which take turns."""
    for side in sides.values():
        side.time(1)
        side.peaks.clear()
    taken = alternate(list(sides.values()), rounds=rounds, calls=1)
    return table(
        {
            name: (seconds, side.peaks)
            for (name, side), seconds in zip(sides.items(), taken, strict=True)
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--operator", type=Path, help="The operators' library of these bundles.")
    parser.add_argument("--tree", type=Path, action="append", default=[])
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    given = parser.parse_args()
    trees = [tree.resolve() for tree in given.tree]
    operator = given.operator and given.operator.resolve()
    for bundle in given.bundles:
        with tempfile.TemporaryDirectory(prefix="bench-start-") as scratch:
            sides = processes(bundle.resolve(), operator, trees, Path(scratch))
            print(f"{bundle.name}\n\n{measure(sides, given.rounds)}\n", flush=True)


if __name__ == "__main__":
    main()
