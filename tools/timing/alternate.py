"""Times several sides against each other on a noisy machine.

Each side runs in its own process, so that two thread pools never compete for the cores, and only
one side works at a time. In every round each side is timed for a few calls, in random order. Ratios
are computed within a round, and their median and quartiles over the rounds are reported. One side
is started twice: the ratio of the two is the control, and differences smaller than the control's
are meaningless. The placement of a process's pages in memory changes its speed by up to a tenth, so
`in_processes` starts all sides several times.

A side is a function without arguments, made by a factory in the worker process:

    if __name__ == "__main__":
        serve_worker(SIDES)          # answers when started with --worker NAME ARGUMENTS
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

Side = Callable[[], object]
_PAUSE = 0.05  # seconds for the spinning threads of the previous side to go to sleep
# The largest part of all processors' time that other processes may use.
BUSY: Final = 0.05
# The largest allowed distance of the control's quartiles from 1.
NOISE: Final = 0.1
WARM_UP = 3  # untimed calls of each side at its start


@dataclass(frozen=True)
class Ratio:
    """The median of a ratio over the rounds, and its first and third quartile."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


class Timed(Protocol):
    """What can be measured in turns."""

    def time(self, calls: int) -> list[float]:
        """Seconds of each of `calls` calls."""
        ...


class Worker:
    """One side in its own process."""

    def __init__(
        self, module: str, name: str, arguments: Mapping[str, Any], *, python: str = sys.executable
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, "-m", module, "--worker", name, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def time(self, calls: int) -> list[float]:
        """Return the seconds of each of `calls` calls."""
        return [float(seconds) for seconds in self.results(calls)]

    def results(self, calls: int) -> list[Any]:
        """Return the results of `calls` calls, for a side that reports more than its seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{calls}\n")
        self._process.stdin.flush()
        answers: list[Any] = self._answer()
        return answers

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended with an error on stderr
            self._process.stdin.close()
        self._process.wait(timeout=60)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker {self.name} ended: its error is above")
        return json.loads(line)


def serve_worker(factories: Mapping[str, Callable[..., Side]], *, warm_up: int = WARM_UP) -> bool:
    """Act as a worker if this process was started as one; otherwise return False at once.

    A call that returns a dictionary reports it instead of its seconds.
    """
    if len(sys.argv) < 2 or sys.argv[1] != "--worker":
        return False
    call = factories[sys.argv[2]](**json.loads(sys.argv[3]))
    for _ in range(warm_up):
        call()
    print("[]", flush=True)
    for line in sys.stdin:
        answers: list[Any] = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            given = call()
            seconds = time.perf_counter() - begin
            answers.append(given if isinstance(given, dict) else seconds)
        print(json.dumps(answers), flush=True)
    return True


def alternate(
    workers: Sequence[Timed], *, rounds: int, calls: int, seed: int = 0
) -> list[list[float]]:
    """Return the median seconds of a call, for each worker (outer) and each round (inner)."""
    order = list(range(len(workers)))
    shuffle = random.Random(seed).shuffle
    medians: list[list[float]] = [[] for _ in workers]
    for _ in range(rounds):
        shuffle(order)
        for index in order:
            time.sleep(_PAUSE)
            medians[index].append(statistics.median(workers[index].time(calls)))
    return medians


def in_processes(
    starters: Sequence[Callable[[], Worker]], *, starts: int, rounds: int, calls: int
) -> list[list[float]]:
    """Like `alternate`, with `rounds` rounds in each of `starts` sets of new processes."""
    taken: list[list[float]] = [[] for _ in starters]
    shuffle = random.Random(starts).shuffle
    for start in range(starts):
        order = list(range(len(starters)))
        shuffle(order)
        workers: dict[int, Worker] = {}
        try:
            for index in order:
                workers[index] = starters[index]()
            found = alternate(
                [workers[index] for index in sorted(workers)],
                rounds=rounds,
                calls=calls,
                seed=start,
            )
        finally:
            for worker in workers.values():
                worker.close()
        for whole, part in zip(taken, found, strict=True):
            whole += part
    return taken


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Return the ratio of two sides, computed within each round."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median=middle, low=low, high=high)


def busy(seconds: float = 2.0) -> float | None:
    """Wait, and return the part of all processors' time used meanwhile; None if unknown."""

    def read() -> tuple[int, int] | None:
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:]
        except OSError:
            return None
        numbers = list(map(int, fields[:8]))
        return sum(numbers), numbers[3] + numbers[4]

    before = read()
    time.sleep(seconds)
    after = read()
    if before is None or after is None or after[0] == before[0]:
        return None
    return 1 - (after[1] - before[1]) / (after[0] - before[0])
