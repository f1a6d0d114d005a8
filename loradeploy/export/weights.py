"""The matrices of a checkpoint, and whether one is what a product of a graph multiplies by.

A sample of rows decides which matrices may be meant; the whole matrix, at its scale and in the
order of its rows, decides whether one is. What differs is allowed as far as rounding explains it:
that of the numbers' formats, or of the bits that a quantised weight has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.adapter.tensors import StoredTensor
from loradeploy.export.products import INTEGER, PACKED, Product

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Rows that are read at a time: a whole output head in fp32 would be half of a model.
_CHUNK: Final = 1024
# 1 − cosine of two rows: what they may differ by and still be worth a comparison.
_SIMILAR_FLOAT: Final = 1e-2
_SIMILAR_QUANTISED: Final = 0.3
# Between numbers that were never rounded, and the formats that exporters round through.
_EXACT: Final = 1e-5
_ROUNDED_THROUGH: Final = ("float16", "bfloat16")
# By the bits of a quantised weight: how far a row may be from the checkpoint's, in parts of its
# length, and the factor between the whole matrices, whose rounding errors cancel out.
_ROUNDED: Final = {16: (1e-3, 1e-3), 8: (0.1, 0.02), 4: (0.4, 0.1), 2: (0.9, 0.4)}
# A row of next to nothing is held against the length that rows have on average.
_SHORTEST: Final = 0.3


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix of the checkpoint [out, in]; `transposed` where it is stored as [in, out]."""

    module: str
    stored: StoredTensor
    transposed: bool
    bias: StoredTensor | None

    @property
    def outputs(self) -> int:
        """The features of a row of y = x Wᵀ."""
        return self.stored.shape[1 if self.transposed else 0]

    @property
    def inputs(self) -> int:
        """The features of a row of x."""
        return self.stored.shape[0 if self.transposed else 1]

    def samples(self) -> list[int]:
        """Rows that tell most others apart."""
        return sorted({0, self.outputs // 3, self.outputs // 2, self.outputs - 1})

    def rows(self, picks: list[int]) -> NDArray[np.float32]:
        """Some rows [picks, in]."""
        values = self.stored.array()
        rows = values[:, picks].T if self.transposed else values[picks]
        return np.ascontiguousarray(rows, dtype=np.float32)


def resembles(product: Product, first: int, matrix: Matrix) -> bool:
    """Whether any sampled row of the product's outputs from `first` on is one of the matrix.

    One is enough: the rows of the others may stand elsewhere, or be scaled.
    """
    if first + matrix.outputs > product.out_features:
        return False
    picks = matrix.samples()
    rows = product.rows([first + pick for pick in picks])
    limit = _SIMILAR_QUANTISED if product.quantised else _SIMILAR_FLOAT
    return rows is not None and bool((_distance(rows, matrix.rows(picks)) < limit).any())


def difference(product: Product, first: int, matrix: Matrix) -> str | None:
    """How the product's outputs from `first` on differ from the matrix; None where they are it.

    Memory for a chunk of rows, not for the whole, unless the rows have to be looked for.
    """
    names = f"{matrix.module}.weight"
    bits = bits_of(product)
    dots = squares = 0.0
    worst = 0.0
    average = _average_length(matrix)
    for rows, expected in _chunks(product, first, matrix):
        if rows is None:
            return f"the numbers of {names} cannot be read from the graph"
        if product.node.op_type == INTEGER:
            rows = _scaled_alike(rows, expected)
        dots += float((rows * expected).sum(dtype=np.float64))
        squares += float((expected * expected).sum(dtype=np.float64))
        worst = max(worst, _worst_row(rows, expected, average, bits))
    factor = dots / squares if squares else 1.0
    row_limit, factor_limit = _ROUNDED[bits] if bits else (1.0, np.inf)
    if worst <= row_limit and abs(factor - 1) <= factor_limit:
        return None
    return _explained(product, first, matrix, factor, bits)


def bits_of(product: Product) -> int:
    """The bits of a quantised weight's numbers; 0 for floating point."""
    if not product.quantised:
        return 0
    if product.node.op_type == PACKED:
        given = product.node.attributes.get("bits")
        return 4 if given is None else given.as_int()
    dtype = product.weight.dtype
    return {4: 4, 2: 2, 8: 8}.get(8 if dtype is None else dtype.bitwidth, 16)


def bias_difference(matrix: Matrix, given: NDArray[np.float32] | None) -> str | None:
    """How the bias [out] in the graph differs from the checkpoint's; None where it does not.

    A bias that is not seen in the graph (None) is no difference: it may be added elsewhere.
    """
    if given is None:
        return None
    name = f"{matrix.module}.bias"
    if matrix.bias is None:
        return f"it adds a bias, the checkpoint has no {name}" if given.any() else None
    expected = matrix.bias.array().astype(np.float32)
    if expected.shape != given.shape:
        return f"its bias has {given.size} numbers, {name} has {expected.size}"
    if _worst_row(given[np.newaxis], expected[np.newaxis], 0.0, 0) <= 1:
        return None
    return f"its bias is not {name}"


def _chunks(
    product: Product, first: int, matrix: Matrix
) -> Iterator[tuple[NDArray[np.float32] | None, NDArray[np.float32]]]:
    for begin in range(0, matrix.outputs, _CHUNK):
        picks = list(range(begin, min(begin + _CHUNK, matrix.outputs)))
        yield product.rows([first + pick for pick in picks]), matrix.rows(picks)


def _average_length(matrix: Matrix) -> float:
    total = sum(
        float(np.square(matrix.rows(list(range(b, min(b + _CHUNK, matrix.outputs))))).sum())
        for b in range(0, matrix.outputs, _CHUNK)
    )
    return float(np.sqrt(total / max(matrix.outputs, 1)))


def _worst_row(
    rows: NDArray[np.float32], expected: NDArray[np.float32], average: float, bits: int
) -> float:
    """The largest deviation of a row; above 1 for floating point that is no rounding of it."""
    if not bits:
        size = np.maximum(np.abs(expected).max(axis=1, keepdims=True), 1e-30)
        return float((_nearest_all(rows, expected) / (_EXACT * size)).max(initial=0))
    lengths = np.maximum(np.linalg.norm(expected, axis=1), _SHORTEST * average)
    errors = np.linalg.norm(rows - expected, axis=1)
    return float((errors / np.maximum(lengths, 1e-30)).max(initial=0))


def _nearest_all(rows: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    """|rows − expected|, of all the expected ones that exporters may have rounded through."""
    errors = [np.abs(rows - expected)]
    for name in _ROUNDED_THROUGH:
        errors.append(np.abs(rows - _rounded(expected, name)))
        # The checkpoint may be the coarser one of the two.
        errors.append(np.abs(_rounded(rows, name) - expected))
    # One way of rounding is meant for all of it, not the best one for each number.
    best: NDArray[np.float32] = min(errors, key=lambda error: float(error.max(initial=0)))
    return best


def _rounded(values: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        if name == "float16":
            half: NDArray[np.float32] = values.astype(np.float16).astype(np.float32)
            return half
    whole = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = whole + np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))
    brain: NDArray[np.float32] = (nearest & np.uint32(0xFFFF0000)).view(np.float32)
    return brain


def _scaled_alike(rows: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    """Integers whose scale stands behind the product: by the one that fits each row best."""
    squares = np.square(rows).sum(axis=1, keepdims=True)
    fit = (rows * expected).sum(axis=1, keepdims=True) / np.maximum(squares, 1e-30)
    scaled: NDArray[np.float32] = rows * fit
    return scaled


def _explained(product: Product, first: int, matrix: Matrix, factor: float, bits: int) -> str:
    """What was seen, as far as a factor or another order of the rows explains it."""
    name = f"{matrix.module}.weight"
    rows = product.rows([first + index for index in range(matrix.outputs)])
    expected = matrix.rows(list(range(matrix.outputs)))
    if rows is None:
        return f"its numbers are not those of {name}"
    limit = _SIMILAR_QUANTISED if bits else _SIMILAR_FLOAT
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
    return bool(error <= (_ROUNDED[bits][0] if bits else 1e-3) * np.linalg.norm(rows))


def _order(
    rows: NDArray[np.float32], expected: NDArray[np.float32], limit: float
) -> NDArray[np.int64] | None:
    """Which row of `expected` each of `rows` is; None where they are not the same rows."""
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
    """1 − cosine, row by row; two rows of zeros are alike, one is like no other."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both = ~a.any(axis=1) & ~b.any(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (a * b).sum(axis=1) / lengths
    distance: NDArray[np.float32] = 1 - np.where(both, 1, np.where(lengths > 0, cosine, 0))
    return distance
