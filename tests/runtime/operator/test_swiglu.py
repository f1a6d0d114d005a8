"""The kernels of SwiGLU and SiluMul compute silu(gate) · up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loradeploy.bundle.names import OPERATOR_DOMAIN
from tests.runtime.operator.nodes import FLOAT, single_node
from tests.tolerances import tolerance

SHAPES = [(1, 1, 3072), (2, 37, 96), (3, 70), (1, 200, 1542), (2,), (2, 0, 8), (1, 3, 0), (5, 1, 6)]


def _packed(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    return 4 * random.standard_normal(shape, np.float32)


def _run(library: Path, x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
    opened = single_node(
        "SwiGLU", OPERATOR_DOMAIN, {"x": FLOAT}, ["y"], {}, library=library, threads=threads
    )
    result: NDArray[np.float32] = opened.run(None, {"x": x})[0]
    return result


def _run_parts(library: Path, gate: NDArray[Any], up: NDArray[Any]) -> NDArray[np.float32]:
    opened = single_node(
        "SiluMul",
        OPERATOR_DOMAIN,
        {"gate": FLOAT, "up": FLOAT},
        ["y"],
        {},
        library=library,
        threads=1,
    )
    result: NDArray[np.float32] = opened.run(None, {"gate": gate, "up": up})[0]
    return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_kernels_compute_silu_of_the_gate_times_up(
    operator_library: Path, shape: tuple[int, ...]
) -> None:
    x = _packed(shape)
    gate, up = np.split(x, 2, axis=-1)
    wide = gate.astype(np.float64)
    correct = wide / (1 + np.exp(-wide)) * up
    result = _run(operator_library, x)
    assert result.shape == correct.shape
    assert (np.abs(result - correct) <= tolerance("operator") * np.abs(correct)).all()
    np.testing.assert_array_equal(_run_parts(operator_library, gate.copy(), up.copy()), result)


def test_gate_and_up_are_not_the_same(operator_library: Path) -> None:
    x = _packed((2, 3, 64))
    turned = np.roll(x, 32, axis=-1)
    assert np.abs(_run(operator_library, x) - _run(operator_library, turned)).max() > 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_several_threads_and_single_rows_compute_the_same(
    operator_library: Path, shape: tuple[int, ...]
) -> None:
    x = _packed(shape)
    one = _run(operator_library, x)
    np.testing.assert_array_equal(_run(operator_library, x, threads=4), one)
    if len(shape) > 1:
        for row in range(shape[0]):
            np.testing.assert_array_equal(_run(operator_library, x[row : row + 1])[0], one[row])


def test_extreme_gates_have_their_limits(operator_library: Path) -> None:
    gate = np.array([0, 100, -100, 1e30, -1e30, np.inf, np.nan], np.float32)
    result = _run_parts(operator_library, gate, np.ones_like(gate))
    np.testing.assert_array_equal(result, np.array([0, 100, 0, 1e30, 0, np.inf, np.nan], "f"))


@pytest.mark.parametrize("shape", [(2, 3, 7), ()], ids=str)
def test_an_odd_last_axis_is_refused(operator_library: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(Exception, match=r"x is \[.*\], expected an even last axis"):
        _run(operator_library, np.zeros(shape, np.float32))


def test_parts_of_different_shapes_are_refused(operator_library: Path) -> None:
    gate, up = np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)
    with pytest.raises(Exception, match=r"up is \[2, 4\], expected \[2, 3\]"):
        _run_parts(operator_library, gate, up)
