"""Find nodes before or after a layer that change the order of its features.

    y[..., order]                   a Gather, or a product with a permutation matrix
    Concat(y[..., 8:], y[..., :8])  a Split or Slices, and a Concat
    [b, s, 2, 8] → [b, s, 8, 2]     a Reshape and a Transpose

Then the rows of the layer's weight, or its columns if its input is reordered, are most likely in
another order than in the checkpoint. A name does not show that, and an adapter's rows would be
added in the wrong order.

The features are numbered, and the numbers are moved as the graph moves the values, up to the nodes
that compute with several features. In heads, halves and slices the numbers still ascend. A rotary
embedding reads the features in two orders, one of which is the original: a reordering counts only
for features that no node uses in the original order.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.export.match.feature_moves import MOVES, UnknownMoveError, moved, permutation_of
from loradeploy.export.match.products import input_of, output_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from loradeploy.export.match.linears import Linear

_SIZES: Final = (2, 3, 5)  # assumed for axes of unknown size, by position
_MOST: Final = 1 << 24  # numbered elements of a value
_ROWS: Final = 2  # axes of the batch and the sequence

# Operators that leave each feature in its place, whatever their other inputs are.
_IN_PLACE: Final = frozenset(
    (
        *("Abs", "BiasGelu", "Cast", "Clip", "DequantizeLinear", "Dropout", "Elu", "Erf", "Exp"),
        *("FastGelu", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LayerNormalization"),
        *("LeakyRelu", "Mish", "Mul", "Neg", "QuantizeLinear", "QuickGelu", "RMSNormalization"),
        *("Relu", "Selu", "Sigmoid", "Silu", "SimplifiedLayerNormalization", "Softplus"),
        *("Softsign", "Sqrt", "Swish", "Tanh"),
    )
)
# Operators that do so with a constant; otherwise they combine the outputs of several layers.
_WITH_CONSTANT: Final = ("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub")
# Operators whose result does not depend on the order, besides Reduce….
_ORDERLESS: Final = ("Shape", "Size")


@dataclass(frozen=True, eq=False)
class _Numbered:
    """A value of the graph, whose elements are the numbers row · `width` + feature.

    `moved_by`: the first node that changed the order of the features.
    """

    numbers: NDArray[np.int64]
    width: int
    moved_by: ir.Node | None = None

    def features(self) -> list[NDArray[np.int64]]:
        """The features of each row, in their current order."""
        numbers = self.numbers.reshape(-1)
        rows = numbers // self.width
        order = np.argsort(rows, kind="stable")
        begins = np.flatnonzero(np.diff(rows[order])) + 1
        return list(np.split(numbers[order] % self.width, begins))

    def ascend(self) -> bool:
        """Whether the features of each row ascend."""
        return all((np.diff(features) >= 0).all() for features in self.features())


_Arrived = tuple["ir.Value", _Numbered]


def reordering_node(linear: Linear) -> ir.Node | None:
    """The node that reorders the layer's input, or the features of its output for all uses."""
    found = (_before(node, linear) or _behind(node, linear) for node in linear.nodes)
    return next((node for node in found if node is not None), None)


def reads_interleaved_pairs(linear: Linear) -> bool:
    """Whether a node computes with every second feature of the layer, as for interleaved pairs."""
    for node in linear.nodes:
        for use in _uses_of_outputs(node, linear):
            steps = [step for row in use.features() for step in np.diff(_own(row, linear))]
            if 2 * steps.count(2) > len(steps):
                return True
    return False


def _behind(node: ir.Node, linear: Linear) -> ir.Node | None:
    uses = _uses_of_outputs(node, linear)
    in_order = [row for use in uses if use.moved_by is None for row in use.features()]
    known = np.unique(np.concatenate(in_order)) if in_order else np.zeros(0, np.int64)
    for use in uses:
        if use.moved_by is not None:
            own = np.concatenate([_own(row, linear) for row in use.features()])
            if len(np.setdiff1d(own, known)):
                return use.moved_by
    return None


def _own(features: NDArray[np.int64], linear: Linear) -> NDArray[np.int64]:
    """The features of the layer's own module, in a fused product."""
    if linear.slice is None:
        return features
    begin, end = linear.slice
    return features[(features >= begin) & (features < end)]


def _uses_of_outputs(node: ir.Node, linear: Linear) -> list[_Numbered]:
    y, x = output_of(node), input_of(node)
    shape = x.shape if y.shape is None and x is not None else y.shape
    if shape is None or not len(shape):
        return []
    start = _numbered([*_sizes(list(shape)[:-1]), _width(node, linear)], len(shape) - 1)
    return [] if start is None else _uses(_follow(y, start))


def _width(node: ir.Node, linear: Linear) -> int:
    """The number of outputs of the product, which may be those of several modules."""
    if linear.slice is None:
        return linear.out_features
    if "N" in node.attributes:
        return node.attributes["N"].as_int()
    assert linear.weight.const_value is not None
    return int(linear.weight.const_value.shape.numpy()[0 if linear.transposed else 1])


def _before(node: ir.Node, linear: Linear) -> ir.Node | None:
    """The node that reorders the product's input, after the last node that computes it."""
    x = input_of(node)
    pending: list[ir.Value] = [] if x is None else [x]
    sources, seen = set(), set(pending)
    while pending:
        value = pending.pop()
        taken = _taken(value.producer())
        if not taken:
            sources.add(value)
        pending += [each for each in taken if each not in seen]
        seen |= set(taken)
    if x is None or len(sources) != 1 or x in sources:
        return None
    source = sources.pop()
    start = None if source.is_graph_input() else _of_source(source, linear.in_features)
    arrived = None if start is None else _follow(source, start, within=seen).get(x)
    return None if arrived is None else arrived.moved_by


def _taken(node: ir.Node | None) -> list[ir.Value]:
    """The inputs that a node moves or changes in place; empty if it combines features."""
    given = [] if node is None else [value for value in node.inputs if value is not None]
    if node is None or not given:
        return []
    if node.op_type == "Concat":
        return given
    if node.op_type in MOVES or (node.op_type in _IN_PLACE and node.op_type != "Mul"):
        return given[:1]
    if node.op_type == "MatMul" and permutation_of(node) is not None:
        return given[:1]
    return [value for value in given if not value.is_initializer()] if _adds_constant(node) else []


def _adds_constant(node: ir.Node) -> bool:
    """Whether a node combines one value with constants only, as in adding a bias."""
    others = [value for value in node.inputs if value is not None and not value.is_initializer()]
    return node.op_type in _WITH_CONSTANT and len(others) == 1


def _of_source(source: ir.Value, size: int) -> _Numbered | None:
    """Number the features of `source`: the last axis, or all axes of known size."""
    shape: Sequence[Any] = [None, None, size] if source.shape is None else list(source.shape)
    if len(shape) <= _ROWS + 1:
        known = bool(shape) and isinstance(shape[-1], int)
        return _numbered(_sizes(shape), len(shape) - 1) if known else None
    rows = [axis for axis, dim in enumerate(shape) if not isinstance(dim, int) or dim == 1]
    if len(rows) < _ROWS:
        return None  # the axis of the sequence is not known
    order = [*rows, *(axis for axis in range(len(shape)) if axis not in rows)]
    sizes = _sizes(shape)
    start = _numbered([sizes[axis] for axis in order], len(rows))
    if start is None:
        return None
    return _Numbered(start.numbers.transpose(np.argsort(order)), start.width)


def _sizes(shape: Sequence[Any]) -> list[int]:
    return [
        dim if isinstance(dim, int) else _SIZES[min(axis, len(_SIZES) - 1)]
        for axis, dim in enumerate(shape)
    ]


def _numbered(sizes: Sequence[int], rows: int) -> _Numbered | None:
    """Number a value whose first `rows` axes are rows; None if it has too many elements."""
    count = int(np.prod(sizes, dtype=np.float64))
    if not 0 < count <= _MOST:
        return None
    width = int(np.prod(sizes[rows:], dtype=np.int64))
    return _Numbered(np.arange(count, dtype=np.int64).reshape(sizes), width)


def _follow(
    start: ir.Value, numbered: _Numbered, within: Container[ir.Value] | None = None
) -> dict[ir.Value, _Numbered]:
    """The values that the numbers are moved to; only those in `within`, if it is given."""
    known = {start: numbered}
    pending = [start]
    while pending:
        for node in {use.node: None for use in pending.pop().uses()}:
            for value, arrived in _through(node, known):
                if value not in known and (within is None or value in within):
                    known[value] = arrived
                    pending.append(value)
    return known


def _through(node: ir.Node, known: Mapping[ir.Value, _Numbered]) -> Iterator[_Arrived]:
    """The outputs of a node that moves the numbers; empty if it computes with them."""
    before = [known[value] for value in node.inputs if value is not None and value in known]
    arrays = [before[0].numbers]
    if node.op_type in MOVES:
        try:
            arrays = moved(node, {value: each.numbers for value, each in known.items()})
        except UnknownMoveError:
            return
    elif (order := permutation_of(node)) is not None:
        arrays = [arrays[0].take(order, axis=-1)]
    elif node.op_type not in _IN_PLACE and not _adds_constant(node):
        return
    by = next((each.moved_by for each in before if each.moved_by is not None), node)
    for value, numbers in zip(node.outputs, arrays, strict=False):
        after = _Numbered(numbers, before[0].width)
        yield value, after if after.ascend() else replace(after, moved_by=by)


def _uses(known: dict[ir.Value, _Numbered]) -> list[_Numbered]:
    """The values that are not only moved: a node computes with them, or they are graph outputs."""
    used = []
    for value, numbered in known.items():
        users = [use.node for use in value.uses()]
        computing = [
            user
            for user in users
            if not any(output in known for output in user.outputs)
            and user.op_type not in _ORDERLESS
            and not user.op_type.startswith("Reduce")
        ]
        if computing or value.is_graph_output():
            used.append(numbered)
    return used
