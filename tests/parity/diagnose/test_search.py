"""The search for the first divergent module, on synthetic values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from loradeploy.parity.diagnose import search as module
from loradeploy.parity.diagnose.search import (
    Found,
    Point,
    Rounding,
    Sides,
    groups,
    measure,
    search,
)
from loradeploy.parity.diagnose.torch_probe import Site

UNIT = 2.0**-24
LIMIT = 16.0
TOKENS, WIDTH = 3, 4
# Two blocks in sequence, and a head. Each takes the output of the one before.
NAMES = ("embed", "layers.0.a", "layers.0.b", "layers.0", "layers.1.a", "layers.1", "head")


def points(names: Sequence[str] = NAMES) -> list[Point]:
    return [Point(Site((name,), (), (1, TOKENS, WIDTH)), name, f"n/{name}", "Op") for name in names]


def chain(
    excess: Sequence[float],
    names: Sequence[str] = NAMES,
    upstream: Sequence[int] | None = None,
    asked: list[list[str]] | None = None,
) -> Found:
    """Search points whose errors are `excess` times the rounding error `UNIT`."""
    made = points(names)
    ones = np.ones((1, TOKENS, WIDTH), np.float64)

    def reference(numbers: Sequence[int]) -> list[Any]:
        if asked is not None:
            asked.append([names[n] for n in numbers])
        return [ones] * len(numbers)

    def disturbed(numbers: Sequence[int]) -> list[Any]:
        return [ones + UNIT] * len(numbers)

    def backend(numbers: Sequence[int]) -> list[Any]:
        return [ones * (1 + excess[n] * UNIT) for n in numbers]

    behind = [(1 << n) - 1 for n in range(len(names))] if upstream is None else upstream
    rounding = Rounding(UNIT, LIMIT, seen=5.0)
    sides = Sides(made, reference, [disturbed] * 2, backend, rounding, behind)
    return search(sides, tokens=TOKENS)


def test_errors_within_the_limit_are_rounding() -> None:
    found = chain([0, 1, 2, 3, 5, 8, LIMIT])
    assert (found.first, found.offenders) == (None, ())
    assert [step.module for step in found.steps] == ["embed", "layers.0", "layers.1", "head"]


def test_the_module_where_the_error_jumps_is_named_and_not_the_modules_after_it() -> None:
    found = chain([0, 1, 1, 1, 900, 950, 1000])
    assert found.first is not None
    assert found.before is not None
    assert (found.first.module, found.first.layer) == ("layers.1.a", 1)
    assert found.before.module == "layers.0"
    assert found.offenders == (found.first,)


def test_a_fault_outside_the_blocks_is_named() -> None:
    assert getattr(chain([500] * 7).first, "module", None) == "embed"
    assert getattr(chain([1, 1, 1, 1, 1, 1, 500]).first, "module", None) == "head"


def test_an_error_that_grows_gradually_has_no_first_module() -> None:
    found = chain([4, 8, 15, 16, 30, 60, 200])
    assert found.first is None
    assert found.largest == pytest.approx(200)
    assert [step.module for step in found.offenders] == ["layers.1", "head"]


def test_an_error_that_disappears_in_later_modules_is_not_a_fault_of_its_module() -> None:
    found = chain([1, 1, 1, 800, 1, 1, 1])
    assert found.first is None
    assert found.lost == ("layers.0",)
    assert "layers.0" not in {step.module for step in found.steps}


def test_parallel_modules_do_not_clear_each_other() -> None:
    # q and k both read the embedding, and the block reads both: k cannot undo an error in q.
    upstream = [0b0, 0b1, 0b1, 0b111, 0b1111]
    names = ("embed", "layers.0.q", "layers.0.k", "layers.0", "head")
    found = chain([0, 400, 1, 300, 300], names, upstream)
    assert getattr(found.first, "module", None) == "layers.0.q"


def test_only_the_divergent_block_is_searched() -> None:
    asked: list[list[str]] = []
    chain([0, 1, 1, 1, 900, 950, 1000], asked=asked)
    assert asked == [["embed", "layers.0", "layers.1", "head"], ["layers.1.a"]]


def test_values_in_memory_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD", 2 * 4 * TOKENS * WIDTH)
    asked: list[list[str]] = []
    found = chain([0, 900, 950, 950, 950, 950, 950], asked=asked)
    assert max(map(len, asked)) == 2
    assert getattr(found.first, "module", None) == "layers.0.a"


def test_nan_diverges() -> None:
    found = chain([0, 1, np.nan, np.nan, np.nan, np.nan, np.nan])
    assert getattr(found.first, "module", None) == "layers.0.b"
    assert found.heatmap is not None
    assert np.isnan(found.heatmap.values[1]).all()


def test_groups_stay_within_the_limit_and_a_larger_value_is_a_group_alone() -> None:
    sizes = enumerate([3, 3, 3, 20, 1, 1])
    assert list(groups(sizes, 6)) == [[0, 1], [2], [3], [4, 5]]


def test_an_error_is_measured_per_position() -> None:
    expected = np.array([[[100.0, 1.0], [2.0, 1.0], [0.0, 0.0]]], np.float32)
    actual = expected + np.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]], np.float32)
    found = measure(expected, actual, positions=True)
    error, scale, share = found.error, found.scale, found.share
    assert error.tolist() == [1, 1, 0]
    assert scale.tolist() == [100, 2, 100]
    assert share.tolist() == [0.01, 0.5, 0]


@pytest.mark.parametrize("precision", module.ROUNDINGS)
def test_the_limits_are_above_the_measured_rounding(precision: str) -> None:
    rounding = module.ROUNDINGS[precision]
    assert rounding.limit >= 2 * rounding.seen
