"""Compare the matrices of a checkpoint with the weights of a graph's products.

A sample of rows selects candidates; the full matrix, including scale and order of rows, decides.
Differences are accepted if rounding explains them: of the dtype, or of the bits of a quantized
weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.tensors import StoredTensor
from loradeploy.export.graph.edit import constant_of
from loradeploy.export.match.bnb4 import MATMUL_BNB4
from loradeploy.export.match.integer_scales import scaling_of
from loradeploy.export.match.products import Product
from loradeploy.export.match.quantized import INTEGER, MATMUL_NBITS, packed_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Rows to read at a time: a full output head in fp32 can be half of a model.
_CHUNK: Final = 1024
# 1 − cosine of two rows, below which the full matrices are compared.
_SIMILAR_FLOAT: Final = 1e-2
_SIMILAR_QUANTIZED: Final = 0.3
# Relative error of values that were not rounded, and dtypes that exporters may round to.
_EXACT: Final = 1e-5
_ROUNDED_THROUGH: Final = ("float16", "bfloat16")
# Rounding to the nearest step leaves 0.29 steps (root mean square); clipped numbers and rounded
# scales make it more.
_MOST_STEPS: Final = 0.5
# Quantizers that do not round to the nearest (GPTQ) leave more, in parts of a row's length; they
# are for few bits. The factor between whole matrices stays 1, since errors cancel out.
_MOST_OF_A_ROW: Final = {4: 0.25, 2: 0.7}
_FACTOR: Final = {16: 1e-3, 8: 0.02, 4: 0.05, 2: 0.3}


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix of the checkpoint [out, in]; `transposed` if it is stored as [in, out]."""

    module: str
    stored: StoredTensor
    transposed: bool
    bias: StoredTensor | None

    @property
    def name(self) -> str:
        """The tensor's name."""
        return f"{self.module}.weight"

    @property
    def outputs(self) -> int:
        """The number of features of y = x Wᵀ."""
        return self.stored.shape[1 if self.transposed else 0]

    @property
    def inputs(self) -> int:
        """The number of features of x."""
        return self.stored.shape[0 if self.transposed else 1]

    def samples(self) -> list[int]:
        """Indices of the rows to compare first."""
        return sorted({0, self.outputs // 3, self.outputs // 2, self.outputs - 1})

    @cached_property
    def sampled(self) -> NDArray[np.float32]:
        """The rows of `samples`, which are compared with every product of the same size."""
        return self.rows(self.samples())

    def rows(self, picks: list[int]) -> NDArray[np.float32]:
        """Some rows [picks, in]."""
        rows = self.stored.take(picks, 1 if self.transposed else 0)
        return np.ascontiguousarray(rows.T if self.transposed else rows, dtype=np.float32)


class Sample:
    """A few rows of a product, each read only once for all comparisons."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self._rows: dict[tuple[int, int], NDArray[np.float32] | None] = {}

    def resembles(self, first: int, matrix: Matrix) -> bool:
        """Whether any sampled row of the product's outputs from `first` on is one of the matrix.

        One is enough: other rows may be in another order, or scaled.
        """
        if first + matrix.outputs > self._product.out_features:
            return False
        span = (first, matrix.outputs)
        if span not in self._rows:
            self._rows[span] = self._product.rows([first + pick for pick in matrix.samples()])
        rows = self._rows[span]
        limit = _SIMILAR_QUANTIZED if self._product.quantized else _SIMILAR_FLOAT
        return rows is not None and bool((_distance(rows, matrix.sampled) < limit).any())


def difference(product: Product, first: int, matrix: Matrix) -> str | None:
    """How the product's outputs from `first` on differ from the matrix; None if they do not.

    Reads the weight in chunks of rows, unless the order of the rows has to be found.
    """
    bits = bits_of(product)
    dots = squares = 0.0
    same = True
    for begin in range(0, matrix.outputs, _CHUNK):
        picks = list(range(begin, min(begin + _CHUNK, matrix.outputs)))
        actual, expected = _read(product, [first + pick for pick in picks]), matrix.rows(picks)
        if actual is None:
            return f"its numbers, or their scale, cannot be read to be compared with {matrix.name}"
        rows, steps = actual
        dots += float((rows * expected).sum(dtype=np.float64))
        squares += float((expected * expected).sum(dtype=np.float64))
        same = same and _same(rows, expected, steps, bits)
    factor = dots / squares if squares else 1.0
    if same and abs(factor - 1) <= _FACTOR.get(bits, np.inf):
        return None
    return _explained(product, first, matrix, factor, bits)


def bits_of(product: Product) -> int:
    """The bits of a quantized weight's numbers; 0 for floating point."""
    if not product.quantized:
        return 0
    if product.node.op_type == MATMUL_NBITS:
        return packed_bits(product.node)
    if product.node.op_type == MATMUL_BNB4:
        return 4
    dtype = product.weight.dtype
    return 8 if dtype is None else min(dtype.bitwidth, 16)


def bias_difference(matrix: Matrix, actual: NDArray[np.float32] | None) -> str | None:
    """How the bias [out] in the graph differs from the checkpoint's; None if it does not.

    A bias that was not found in the graph (None) is not a difference: it may be added elsewhere.
    """
    if actual is None:
        return None
    name = f"{matrix.module}.bias"
    if matrix.bias is None:
        return f"it adds a bias, the checkpoint has no {name}" if actual.any() else None
    expected = matrix.bias.array().astype(np.float32)
    if expected.shape != actual.shape:
        return f"its bias has {actual.size} values, {name} has {expected.size}"
    if _same(actual[np.newaxis], expected[np.newaxis], None, 0):
        return None
    return f"its bias is not {name}"


def is_stored(numbers: NDArray[Any], stored: StoredTensor) -> bool:
    """Whether a constant of any rank has the values of a tensor of the checkpoint, up to rounding.

    The first row is compared alone, because most tensors of the same shape differ in it.
    """
    if numbers.shape != stored.shape or not numbers.size:
        return False
    for begin, end in ((0, 1), *((at, at + _CHUNK) for at in range(0, len(numbers), _CHUNK))):
        rows = numbers[begin:end]
        picks = list(range(begin, begin + len(rows)))
        expected = stored.take(picks, 0).astype(np.float32)
        matrix = (len(picks), -1)
        if not _same(rows.astype(np.float32).reshape(matrix), expected.reshape(matrix), None, 0):
            return False
    return True


def _read(
    product: Product, picks: list[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None] | None:
    """Some rows and, for a quantized weight, its quantization steps; None if not readable."""
    rows = product.rows(picks)
    if rows is None or not product.quantized:
        return None if rows is None else (rows, None)
    steps = product.steps(picks)
    if steps is None:
        return None
    if product.node.op_type == INTEGER:
        scale = _scale_behind(product, picks)
        if scale is None:
            return None
        rows, steps = rows * scale, steps * scale
    return rows, steps


def _scale_behind(product: Product, picks: list[int]) -> NDArray[np.float32] | None:
    """The scale [picks, 1] of a MatMulInteger's weight, by which its result is multiplied."""
    scaling = scaling_of(product.node)
    found = () if scaling is None else scaling.weight
    scale = np.ones((1, 1), np.float32)
    for each in found:
        numbers = constant_of(each).astype(np.float32).reshape(-1)
        if numbers.size > 1:
            if len(numbers) <= max(picks):
                return None
            numbers = numbers[picks]
        scale = scale * numbers[:, np.newaxis]
    return scale if found else None


def _same(
    rows: NDArray[np.float32],
    expected: NDArray[np.float32],
    steps: NDArray[np.float32] | None,
    bits: int,
) -> bool:
    """Whether rows equal the expected ones, up to rounding."""
    if steps is None:
        size = np.maximum(np.abs(expected).max(axis=1, keepdims=True), 1e-30)
        return bool((_nearest_all(rows, expected) <= _EXACT * size).all())
    error = rows - expected
    smallest = np.abs(expected).max(axis=1, keepdims=True) * 1e-6 + 1e-12
    in_steps = error / np.maximum(np.abs(steps), smallest)
    fits = np.sqrt(np.square(in_steps).mean(axis=1)) <= _MOST_STEPS
    if not fits.all() and bits in _MOST_OF_A_ROW:
        lengths = np.linalg.norm(expected, axis=1)
        fits |= np.linalg.norm(error, axis=1) <= _MOST_OF_A_ROW[bits] * lengths
    return bool(fits.all())


def _nearest_all(rows: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    """|rows − expected| with the best of the dtypes that an exporter may have rounded through."""
    errors = [np.abs(rows - expected)]
    for name in _ROUNDED_THROUGH:
        errors.append(np.abs(rows - _rounded(expected, name)))
        # The checkpoint may be the less precise of the two.
        errors.append(np.abs(_rounded(rows, name) - expected))
    # One rounding applies to all values, not the best one for each.
    best: NDArray[np.float32] = min(errors, key=lambda error: float(error.max(initial=0)))
    return best


def _rounded(values: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    if name == "bfloat16":
        half = to_bfloat16(values)
    else:
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
    full: NDArray[np.float32] = half.astype(np.float32)
    return full


def _explained(product: Product, first: int, matrix: Matrix, factor: float, bits: int) -> str:
    """A description of the difference: a factor, another order of rows, or other values."""
    name = matrix.name
    actual = _read(product, [first + index for index in range(matrix.outputs)])
    expected = matrix.rows(list(range(matrix.outputs)))
    assert actual is not None, "it was read before"
    rows = actual[0]
    limit = _SIMILAR_QUANTIZED if bits else _SIMILAR_FLOAT
    aligned = _distance(rows, expected) < limit
    if aligned.all():
        if abs(factor - 1) > _EXACT and _is_factor(rows, expected, factor, bits):
            return f"it is {factor:.4g} × {name}"
        return f"it resembles {name} and differs in its numbers: another checkpoint's, or changed"
    order = _order(rows, expected, limit)
    if order is not None:
        moved = int((order != np.arange(len(order))).sum())
        return f"it has the rows of {name} in another order ({moved} of {len(order)} moved)"
    return f"{int((~aligned).sum())} of {len(aligned)} rows are not those of {name}"


def _is_factor(
    rows: NDArray[np.float32], expected: NDArray[np.float32], factor: float, bits: int
) -> bool:
    error = np.linalg.norm(rows - factor * expected)
    return bool(error <= (_MOST_OF_A_ROW.get(bits, 0.05) if bits else 1e-3) * np.linalg.norm(rows))


def _order(
    rows: NDArray[np.float32], expected: NDArray[np.float32], limit: float
) -> NDArray[np.int64] | None:
    """The index in `expected` of each of `rows`; None if they are not the same rows."""
    if len(rows) > _CHUNK * 8:
        return None
    a = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    b = expected / np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-30)
    likeness = a @ b.T
    order: NDArray[np.int64] = likeness.argmax(axis=1)
    if (likeness.max(axis=1) < 1 - limit).any() or len(set(order.tolist())) != len(order):
        return None
    return order


def _distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 − cosine, row by row: 0 for two rows of zeros, 1 for a row of zeros and another."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both = ~a.any(axis=1) & ~b.any(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (a * b).sum(axis=1) / lengths
    distance: NDArray[np.float32] = 1 - np.where(both, 1, np.where(lengths > 0, cosine, 0))
    return distance


def to_bfloat16(values: NDArray[Any]) -> NDArray[Any]:
    """`values` rounded to the nearest bfloat16, ties to even."""
    import ml_dtypes

    return values.astype(ml_dtypes.bfloat16)
