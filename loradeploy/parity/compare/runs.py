"""Runs one side on all cases, and checks that it is deterministic."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.errors import kind_and_line, listed
from loradeploy.parity.compare.feeds import Fed, Feed, shapes
from loradeploy.parity.compare.outputs import (
    LimitsOf,
    is_logits,
    named,
    positions,
    scale_of,
)
from loradeploy.parity.compare.sides import Side
from loradeploy.parity.figures.metrics import Comparison
from loradeploy.parity.report.results import Result, outcome_of
from loradeploy.parity.verdict import judge
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.parity.compare.sides import Given

logger = logger_of(__name__)

# Larger arrays of the reference are kept in files until the candidate has been run.
_IN_MEMORY: Final = 1 << 20  # values


@dataclass
class Runs:
    """Runs one side on all cases, and then on the first successful one again.

    Iterating runs the model and yields its outputs for each case, or None if it raised.
    """

    side: Side
    role: str
    fed: Fed
    renamed: Mapping[str, str]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    twice: tuple[Given, Given] | None = None

    def __iter__(self) -> Iterator[Given | None]:
        first: tuple[int, Given] | None = None
        for number, feed in enumerate(self.fed.cases):
            logger.info("%s, case %d of %d", self.side.title, number + 1, len(self.fed.cases))
            given = self._run(number, feed)
            if given is not None and first is None:
                first = number, _copied(given)
            yield given
        if first is not None:
            again = self._run(first[0], self.fed.cases[first[0]])
            self.twice = None if again is None else (first[1], _copied(again))

    def result(self, limits: LimitsOf) -> Result:
        """Return the result: whether all cases ran, and the repeated case gave the same outputs."""
        message = None
        if self.problems:
            message = f"the {self.role} raised {listed(self.problems, 1)}"
        elif self.twice is not None:
            message = self._nondeterminism(*self.twice, limits)
        return Result(
            self.role,
            f"{self.role} {self.side.name}",
            adapter=None,
            phase=None,
            outcome=outcome_of(message),
            message=message,
            seconds=round(self.seconds, 3),
            aspect="runs",
        )

    def _run(self, number: int, feed: Feed) -> Given | None:
        begin = time.perf_counter()
        try:
            given = self.side.run({self.renamed.get(n, n): value for n, value in feed.items()})
        except (Exception, SystemExit) as problem:  # a user's sys.exit(0) must not count as passed
            reason = kind_and_line(problem)
            self.problems.append(f"on case {number + 1} ({shapes(feed)}): {reason}")
            return None
        self.seconds += time.perf_counter() - begin
        if isinstance(given, dict):
            back = {theirs: name for name, theirs in self.renamed.items()}
            given = {back.get(name, name): values for name, values in given.items()}
        return given

    def _nondeterminism(self, first: Given, second: Given, limits: LimitsOf) -> str | None:
        beginning = f"the {self.role} is nondeterministic: "
        one, two = named(first, first), named(second, second)
        if {n: v.shape for n, v in one.items()} != {n: v.shape for n, v in two.items()}:
            why = "two runs return different outputs, or outputs of different shapes"
            return f"{beginning}{why}{self.side.hint}"
        largest, where, fails = 0.0, "", False
        for name, values in one.items():
            if np.array_equal(values, two[name], equal_nan=values.dtype.kind == "f"):
                continue
            scale = scale_of([values])
            comparison = Comparison(scale=scale, logits=is_logits(name))
            comparison.add(positions(name, values), positions(name, two[name]))
            verdict = judge(comparison.figures(), limits(scale=scale), effect=None)
            failed, error = not verdict.passed, verdict.figures.max_abs
            if (failed, error) >= (fails, largest):
                largest, where, fails = error, name, failed
        difference = f"two runs differ by {largest:.2g} at output {where}"
        if fails:
            return f"{beginning}{difference}{self.side.hint}"
        if where:
            self.notes.append(
                f"the {self.role} is nondeterministic, but within the limits: {difference}"
            )
        return None


def kept_in(given: Given | None, scratch: Path) -> Given | None:
    """Return a copy of the reference's outputs, with large arrays in memory-mapped files."""
    if given is None:
        return None

    def keep(values: NDArray[Any]) -> NDArray[Any]:
        if values.size < _IN_MEMORY:
            return np.array(values)
        file = scratch / f"{len(os.listdir(scratch))}.npy"
        np.save(file, values)
        mapped: NDArray[Any] = np.load(file, mmap_mode="r")
        return mapped

    return _each(keep, given)


def _copied(given: Given) -> Given:
    return _each(np.array, given)


def _each(change: Callable[[NDArray[Any]], NDArray[Any]], given: Given) -> Given:
    if isinstance(given, list):
        return [change(values) for values in given]
    return {name: change(values) for name, values in given.items()}
