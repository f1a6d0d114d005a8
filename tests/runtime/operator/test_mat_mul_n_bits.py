"""The kernel of MatMulNBits computes what onnxruntime's node computes, or refuses its inputs."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from loradeploy.bundle.names import OPERATOR_DOMAIN
from loradeploy.export.match.quantized import unpack
from loradeploy.runtime.operator.library import check_library
from tests.runtime.operator.nodes import FLOAT, UINT8, single_node
from tests.tolerances import tolerance

Arrays = dict[str, NDArray[Any]]
NAME = "MatMulNBits"

# bits, block, with zero points
LAYOUTS = [(bits, block, zeros) for bits in (4, 8) for block in (32, 64, 128) for zeros in (0, 1)]
# K, N: of models, and those that fill neither blocks, vectors nor groups of columns
SHAPES = [(576, 192), (1536, 48), (2048, 80), (100, 5), (31, 1), (1030, 67), (96, 17), (129, 3)]
ROWS = [1, 2, 3, 5, 8, 17, 50, 133]


@pytest.fixture(scope="module")
def library(operator_library: Path) -> Path:
    if NAME not in check_library(operator_library):
        pytest.skip("there is no fast kernel for this processor")
    return operator_library


def _inputs(
    shape: tuple[int, int], layout: tuple[int, int, int] = (4, 32, 0), rows: int = 3
) -> Arrays:
    (into, out), (bits, block, zeros) = shape, layout
    blocks = -(-into // block)
    random = np.random.default_rng(into + out + rows)
    # Rows and inputs of unlike sizes, and a block of zeros.
    A = random.standard_normal((rows, into), np.float32)
    A *= np.exp(random.standard_normal((rows, 1), np.float32))
    A[rows // 2, :block] = 0
    given = {
        "A": A,
        "B": random.integers(0, 256, (out, blocks, block * bits // 8), np.uint8),
        "scales": random.uniform(0.001, 0.02, (out, blocks)).astype(np.float32),
    }
    if zeros:
        size = -(-blocks * bits // 8)
        given["zero_points"] = random.integers(0, 256, (out, size), np.uint8)
    return given


def _attributes(
    shape: tuple[int, int], layout: tuple[int, int, int] = (4, 32, 0)
) -> dict[str, int]:
    (K, N), (bits, block, _) = shape, layout
    return {"K": K, "N": N, "bits": bits, "block_size": block, "accuracy_level": 4}


def _opened(
    library: Path | None, given: Arrays, attributes: dict[str, int], threads: int = 1
) -> onnxruntime.InferenceSession:
    """The call with constant weights: onnxruntime's node quantizes A only for these."""
    domain = "com.microsoft" if library is None else OPERATOR_DOMAIN
    constants = {name: values for name, values in given.items() if name != "A"}
    options: dict[str, Any] = {"library": library, "threads": threads}
    return single_node(
        NAME, domain, {"A": FLOAT}, ["Y"], attributes, constants=constants, **options
    )


def _run(
    library: Path | None, given: Arrays, attributes: dict[str, int], threads: int = 1
) -> NDArray[Any]:
    opened = _opened(library, given, attributes, threads)
    result: NDArray[Any] = opened.run(None, {"A": given["A"]})[0]
    return result


def _expected(given: Arrays, shape: tuple[int, int], layout: tuple[int, int, int]) -> NDArray[Any]:
    """The definition: exact sums of integers for each block, the rest in float64."""
    (into, out), (bits, block, zeros) = shape, layout
    blocks = -(-into // block)
    A = np.zeros((len(given["A"]), blocks * block), np.float32)
    A[:, :into] = given["A"]
    A = A.reshape(-1, blocks, block)
    most = np.abs(A).max(axis=-1, keepdims=True)
    factor = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    x = np.rint(A * factor).astype(np.float64)
    w = unpack(given["B"].reshape(out, -1), bits).reshape(out, blocks, block).astype(np.float64)
    middle = np.full((out, blocks), 1 << (bits - 1), np.float64)
    if zeros:
        middle = unpack(given["zero_points"], bits)[:, :blocks].astype(np.float64)
    w = (w - middle[..., None]) * given["scales"][..., None]
    return np.asarray(np.einsum("rbk,nbk->rn", x * (most / np.float32(127)), w))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_computes_what_onnxruntime_computes(
    library: Path, shape: tuple[int, int], layout: tuple[int, int, int]
) -> None:
    attributes = _attributes(shape, layout)
    given = _inputs(shape, layout, max(ROWS))
    ours, standard = (_opened(each, given, attributes) for each in (library, None))
    definition = _expected(given, shape, layout)
    for rows in ROWS:
        feed = {"A": given["A"][:rows]}
        result, correct = ours.run(None, feed)[0], standard.run(None, feed)[0]
        size = np.abs(definition[:rows]).max()
        assert np.abs(result - definition[:rows]).max() <= tolerance("blocks") * size
        assert np.abs(result - correct).max() <= tolerance("blocks") * size


@pytest.mark.parametrize(("weight", "zero_point"), [(0, 255), (255, 0)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_largest_sums_are_exact(
    library: Path, layout: tuple[int, int, int], weight: int, zero_point: int
) -> None:
    """With AVX2, sums of two or more products are integers of 16 bits."""
    shape = (1030, 17)
    given = _inputs(shape, layout, 7)
    signs = np.where(np.arange(7) % 2, -1, 1).astype(np.float32)
    given["A"] = np.tile(3 * signs[:, None], shape[0])
    for name, value in {"B": weight, "zero_points": zero_point}.items():
        if name in given:
            given[name] = np.full_like(given[name], value)
    opened = _opened(library, given, _attributes(shape, layout))
    definition = _expected(given, shape, layout)
    for rows in (1, 7):
        result = opened.run(None, {"A": given["A"][:rows]})[0]
        np.testing.assert_allclose(result, definition[:rows], rtol=tolerance("blocks"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_the_other_rows(
    library: Path, shape: tuple[int, int], layout: tuple[int, int, int]
) -> None:
    given = _inputs(shape, layout, 133)
    opened = _opened(library, given, _attributes(shape, layout))
    together = opened.run(None, {"A": given["A"]})[0]
    for count in ROWS[:-1]:
        for first in (0, 60, 133 - count):
            alone = opened.run(None, {"A": given["A"][first : first + count]})[0]
            np.testing.assert_array_equal(alone, together[first : first + count])


@pytest.mark.parametrize("rows", [1, 8, 300])
@pytest.mark.parametrize("bits", [4, 8])
def test_several_threads_compute_the_same(library: Path, bits: int, rows: int) -> None:
    shape, layout = (576, 3072), (bits, 32, 0)
    given, attributes = _inputs(shape, layout, rows), _attributes(shape, layout)
    one, several = (_run(library, given, attributes, threads) for threads in (1, 4))
    np.testing.assert_array_equal(one, several)
    error = np.abs(one - _expected(given, shape, layout)).max()
    assert error <= tolerance("blocks") * np.abs(one).max()


def test_many_rows_are_computed_in_parts(library: Path) -> None:
    shape, layout = (2048, 20), (8, 32, 0)
    given, attributes = _inputs(shape, layout, 1000), _attributes(shape, layout)
    opened = _opened(library, given, attributes)
    together = opened.run(None, {"A": given["A"]})[0]
    for row in range(0, 1000, 37):
        alone = opened.run(None, {"A": given["A"][row : row + 1]})[0]
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (layout, name)
        for layout in LAYOUTS
        for name in ("B", "scales", *(["zero_points"] if layout[2] else []))
    ],
    ids=str,
)
def test_every_weight_counts(library: Path, layout: tuple[int, int, int], name: str) -> None:
    shape = (200, 21)
    given, attributes = _inputs(shape, layout, 7), _attributes(shape, layout)
    before = _run(library, given, attributes)
    changed = dict(given)
    changed[name] = given[name].copy()
    if name == "scales":
        changed[name][9, 1] *= 2
    else:
        changed[name].reshape(21, -1)[9, 0] ^= 1 << (layout[0] - 1)
    difference = _run(library, changed, attributes) != before
    assert np.flatnonzero(difference.any(axis=0)).tolist() == [9]
    # Only the row whose block is zeros does not see another weight of this block.
    assert difference[:, 9].tolist() == [name == "scales" or row != 3 for row in range(7)]


def test_leading_axes_are_rows(library: Path) -> None:
    shape = (96, 17)
    given, attributes = _inputs(shape, rows=12), _attributes(shape)
    flat = _run(library, given, attributes)
    given["A"] = given["A"].reshape(2, 3, 2, 96)
    np.testing.assert_array_equal(_run(library, given, attributes), flat.reshape(2, 3, 2, 17))
    given["A"] = given["A"][0, 0, 0]
    np.testing.assert_array_equal(_run(library, given, attributes), flat[0])


@pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0)], ids=str)
def test_no_rows_give_an_empty_result(library: Path, leading: tuple[int, ...]) -> None:
    given = _inputs((96, 17))
    given["A"] = np.zeros((*leading, 96), np.float32)
    assert _run(library, given, _attributes((96, 17))).shape == (*leading, 17)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("rows", [2, 20])
def test_a_value_that_is_not_finite_stays_in_its_row(
    library: Path, rows: int, value: float
) -> None:
    given = _inputs((96, 17), rows=rows)
    given["A"][1, 40] = value
    finite = np.isfinite(_run(library, given, _attributes((96, 17))))
    assert finite.all(axis=1).tolist() == [row != 1 for row in range(rows)]
    assert not finite[1].any()


def test_values_too_small_for_a_scale_are_zero(library: Path) -> None:
    given = _inputs((96, 17), rows=2)
    given["A"][0] = 1e-38
    result = _run(library, given, _attributes((96, 17)))
    assert not result[0].any()
    assert result[1].all()


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page of memory")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(31, 1), (100, 5), (129, 3)], ids=str)
def test_nothing_is_read_beyond_the_end_of_an_input(
    library: Path, shape: tuple[int, int], layout: tuple[int, int, int]
) -> None:
    kinds = {"A": FLOAT, "B": UINT8, "scales": FLOAT, "zero_points": UINT8}
    opened = single_node(
        NAME,
        OPERATOR_DOMAIN,
        {name: kinds[name] for name in _inputs(shape, layout)},
        ["Y"],
        _attributes(shape, layout),
        library=library,
    )
    for rows in (1, 7):
        given = _inputs(shape, layout, rows)
        correct = opened.run(None, given)[0]
        guarded = {name: _before_a_guard(values) for name, values in given.items()}
        np.testing.assert_array_equal(opened.run(None, guarded)[0], correct)


def _before_a_guard(values: NDArray[Any]) -> NDArray[Any]:
    """A copy whose last byte is the last one before a page that cannot be read."""
    pages = -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(start + pages), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = np.frombuffer(memory, values.dtype, values.size, pages - values.nbytes)
    copy = copy.reshape(values.shape)
    copy[...] = values
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A": (3, 95)}, r"A is \[3, 95\], its last axis must be K, 96"),
        ({"A": ()}, r"A is \[\], its last axis must be K, 96"),
        ({"B": (17, 3, 15)}, r"B is \[17, 3, 15\], expected \[17, 3, 16\]"),
        ({"B": (17, 2, 16)}, r"B is \[17, 2, 16\], expected \[17, 3, 16\]"),
        ({"B": (16, 3, 16)}, r"B is \[16, 3, 16\], expected \[17, 3, 16\]"),
        ({"B": (17, 48)}, r"B is \[17, 48\], expected 3 axes"),
        ({"scales": (17, 2)}, r"scales is \[17, 2\], expected \[17, 3\]"),
        ({"scales": (50,)}, r"scales is \[50\], expected \[17, 3\]"),
        ({"zero_points": (17, 1)}, r"zero_points is \[17, 1\], expected \[17, 2\]"),
        ({"zero_points": (33,)}, r"zero_points is \[33\], expected \[17, 2\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_inputs_that_do_not_fit_are_refused(
    library: Path, changes: dict[str, tuple[int, ...]], message: str
) -> None:
    given = _inputs((96, 17), (4, 32, 1))
    for name, shape in changes.items():
        given[name] = np.zeros(shape, given[name].dtype)
    with pytest.raises(Exception, match=f"MatMulNBits: {message}"):
        _run(library, given, _attributes((96, 17)))


def test_scales_and_zero_points_may_be_flat(library: Path) -> None:
    given, attributes = _inputs((96, 17), (4, 32, 1)), _attributes((96, 17))
    correct = _run(library, given, attributes)
    for name in ("scales", "zero_points"):
        given[name] = given[name].reshape(-1)
    np.testing.assert_array_equal(_run(library, given, attributes), correct)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 2}, "bits 2 in blocks of 32 are not supported"),
        ({"block_size": 16}, "bits 4 in blocks of 16 are not supported"),
        ({"block_size": 256}, "bits 4 in blocks of 256 are not supported"),
        ({"K": 0}, "K is 0 and N is 17"),
        ({"N": -1}, "K is 96 and N is -1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_nodes_that_the_kernel_cannot_compute_are_refused(
    library: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(Exception, match=f"MatMulNBits: {message}"):
        _opened(library, _inputs((96, 17)), _attributes((96, 17)) | changes)
