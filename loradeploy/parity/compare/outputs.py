"""Matches the outputs of two sides by name and compares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from loradeploy.bundle.names import LOGITS, PRESENT
from loradeploy.errors import listed
from loradeploy.parity.compare.feeds import Fed, shapes
from loradeploy.parity.figures.metrics import Comparison
from loradeploy.parity.figures.tolerances import Limit
from loradeploy.parity.report.results import CANDIDATE, COMPARED, REFERENCE, Result
from loradeploy.parity.verdict import judge

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.parity.compare.sides import Given


class LimitsOf(Protocol):
    """Limits by metric, for values of which the largest is `scale`."""

    def __call__(self, *, scale: float) -> Mapping[str, Limit]: ...


_LISTED: Final = 5
_CACHE: Final = PRESENT.rstrip(".")
_ALL: Final = "outputs"  # the aspect of a problem that concerns no single output


@dataclass
class _Output:
    """The comparison of one output, or of a cache. `problems`: why it fails; the first is shown."""

    comparison: Comparison
    scale: float
    problems: list[str] = field(default_factory=list)
    nan_on_both: bool = False


class Outputs:
    """The outputs of both sides, matched by name; `kept`: the reference's outputs of each case."""

    def __init__(self, kept: Sequence[Given | None], fed: Fed) -> None:
        self._kept = list(kept)
        self._fed = fed
        self._found: dict[str, _Output] = {}
        self._halves = False

    @property
    def precision(self) -> str:
        """The candidate's precision, inferred from its outputs."""
        return "fp16" if self._halves else "fp32"

    def add(self, number: int, given: Given | None) -> None:
        """Add the candidate's outputs for a case; None if it raised."""
        kept = self._kept[number]
        if kept is None or given is None:
            return
        problem = _unmatched(kept, given, REFERENCE) or _unmatched(given, kept, CANDIDATE)
        if problem is not None:
            self._of(_ALL).problems.append(problem)
            return
        if isinstance(kept, list):  # from now on, all cases have the candidate's names
            self._kept = [
                its if its is None or _unmatched(its, given, REFERENCE) else named(its, given)
                for its in self._kept
            ]
        expected, actual = named(kept, given), named(given, kept)
        case = f"case {number + 1} ({shapes(self._fed.cases[number])})"
        self._halves |= any(values.dtype == np.float16 for values in actual.values())
        for who, gives, others in ((CANDIDATE, actual, expected), (REFERENCE, expected, actual)):
            if missing := [name for name in others if name not in gives]:
                self._of(_ALL).problems.append(
                    f"the {who} does not give {listed(missing, _LISTED)}"
                    f" (it gives {listed(list(gives), _LISTED)})"
                )
        for name in expected:
            if name in actual:
                self._compare(name, expected[name], actual[name], number, case)

    def results(self, name: str, limits: LimitsOf) -> list[Result]:
        """Judge every output and return its result."""
        results = []
        if not self._found:
            self._of(_ALL).problems.append("no output is common to both sides")
        for aspect, output in self._found.items():
            figures = output.comparison.figures()
            verdict = judge(figures, limits(scale=output.scale), effect=None)
            problem = output.problems[0] if output.problems else None
            if output.nan_on_both and not output.problems:
                problem = f"{verdict.failure}: NaN on both sides proves nothing"
            results.append(
                verdict.result(
                    backend=COMPARED,
                    title=f"{CANDIDATE} {name}",
                    aspect=aspect,
                    problem=problem,
                )
            )
        return results

    def _compare(
        self, name: str, expected: NDArray[Any], actual: NDArray[Any], number: int, case: str
    ) -> None:
        output = self._of(_family(name))
        if expected.shape != actual.shape:
            narrow = expected.ndim > 1 and expected.shape[:-1] == actual.shape[:-1]
            why = ": the vocabulary or the number of labels differs" if narrow else ""
            output.problems.append(
                f"{name} is {list(actual.shape)} where {list(expected.shape)} is expected,"
                f" in {case}{why}"
            )
            return
        if not expected.size:
            return
        expected, actual = positions(name, expected), positions(name, actual)
        output.comparison.add(expected, actual, case=number)
        output.nan_on_both |= bool((np.isnan(expected) & np.isnan(actual)).any())

    def _of(self, name: str) -> _Output:
        if name not in self._found:
            given = [
                values
                for its in self._kept
                if isinstance(its, dict)
                for own, values in its.items()
                if _family(own) == name
            ]
            scale = scale_of(given)
            self._found[name] = _Output(Comparison(scale=scale, logits=is_logits(name)), scale)
        return self._found[name]


def named(given: Given, like: Given) -> dict[str, NDArray[Any]]:
    """Return outputs by name; those without names get the names of `like`, in order."""
    if isinstance(given, dict):
        return given
    names = list(like) if isinstance(like, dict) else [f"output {n}" for n in range(len(given))]
    return dict(zip(names, given, strict=True))


def _family(name: str) -> str:
    """Return the aspect of an output; all tensors of a cache have the same one."""
    return _CACHE if name.startswith(PRESENT) else name


def _unmatched(given: Given, like: Given, who: str) -> str | None:
    """Return why outputs without names cannot get the names of `like`; None if they can."""
    if not isinstance(given, list) or not isinstance(like, dict) or len(given) == len(like):
        return None
    return (
        f"the {who} gives {len(given)} without names, the other side {len(like)}:"
        f" {listed(list(like), _LISTED)}"
    )


def is_logits(name: str) -> bool:
    """Whether an output holds logits over its last axis, judging by its name."""
    return name.endswith(LOGITS)


def positions(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Reshape `values` to [positions, width]: a position for each vector of logits, else each row.

    Cosine and divergence need vectors: an array with a single value per row is one position.
    """
    if values.dtype.kind == "b":
        values = values.astype(np.int8)
    if values.ndim < 2 or values[0].size == 1:
        return values.reshape(1, -1)
    width = values.shape[-1] if is_logits(name) else values[0].size
    return values.reshape(-1, width)


def scale_of(given: Sequence[NDArray[Any]]) -> float:
    """Return the largest finite absolute value; 0 for integers, which must be equal."""
    return max(
        (
            float(np.max(np.abs(values), where=np.isfinite(values), initial=0.0))
            for values in given
            if values.dtype.kind == "f"
        ),
        default=0.0,
    )
