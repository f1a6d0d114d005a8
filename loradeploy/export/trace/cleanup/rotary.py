"""Fuse rotary embeddings whose tables are cast or scaled, as in half precision.

    c = f(Concat(φ, φ))                 →   RotaryEmbedding(x, f(φ), g(φ))
    s = g(Concat(φ, φ))
    x · c + Concat(-x₂, x₁) · s             x₁, x₂ the halves of x [batch, heads, sequence, size]

f and g are elementwise: cos and sin, a cast, a constant factor. onnxscript's rule matches only cos
and sin, as in float32 models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loradeploy.export.graph.edit import constant_of, remove_unused, replace_uses

if TYPE_CHECKING:
    import onnx_ir as ir

_AXES: Final = 4  # of x
_LAST: Final = (_AXES - 1, -1)


@dataclass(frozen=True, eq=False)
class _Table:
    """c or s before the concatenation of halves: `angles` φ, and the `steps` applied to them."""

    angles: ir.Value
    steps: tuple[ir.Node, ...]


def fuse_rotary(graph: ir.Graph) -> None:
    """Fuse every rotation into a RotaryEmbedding, including those with cast or scaled tables."""
    made: dict[tuple[ir.Value, tuple[ir.Node, ...]], ir.Value] = {}
    for node in list(graph):
        if node.op_type == "Add" and node.domain == "":
            _fuse(graph, node, made)
    remove_unused(graph)


def _fuse(
    graph: ir.Graph, add: ir.Node, made: dict[tuple[ir.Value, tuple[ir.Node, ...]], ir.Value]
) -> None:
    import onnx_ir as ir

    one, other = (_factors(value) for value in add.inputs)
    if one is None or other is None:
        return
    for (x, cos), (rotated, sin) in ((one, other), (other, one)):
        heads = _heads(x)
        first, second = _table(cos), _table(sin)
        if heads is None or first is None or second is None or not _is_rotated(rotated, x):
            continue
        if first.angles is not second.angles or not _fit(first.angles, x):
            continue
        tables = [_on_half(graph, table, add, made) for table in (first, second)]
        numbers = {"interleaved": 0, "num_heads": heads}
        new = ir.node("RotaryEmbedding", [x, *tables], attributes=numbers)
        new.name = f"{add.name}/rotary"
        new.outputs[0].name = new.name
        new.metadata_props.update(add.metadata_props)
        graph.insert_before(add, new)
        replace_uses(add.outputs[0], new.outputs[0])
        return


def _factors(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The factors x and table of x · table, where the table is [batch, 1, sequence, size]."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Mul":
        return None
    one, other = node.inputs
    if one is None or other is None:
        return None
    if _unsqueezed(other) is not None:
        return one, other
    return (other, one) if _unsqueezed(one) is not None else None


def _unsqueezed(table: ir.Value) -> ir.Value | None:
    """The table without its axis for heads."""
    node = table.producer()
    if node is None or node.op_type != "Unsqueeze" or node.inputs[1] is None:
        return None
    axes = node.inputs[1]
    if axes.const_value is None or constant_of(axes).tolist() != [1]:
        return None
    return node.inputs[0]


def _table(value: ir.Value) -> _Table | None:
    steps: list[ir.Node] = []
    current = _unsqueezed(value)
    while current is not None and (node := current.producer()) is not None:
        if node.op_type == "Concat":
            halves = list(node.inputs)
            last = node.attributes["axis"].as_int() in (-1, 2)
            if len(halves) != 2 or halves[0] is not halves[1] or not last or not steps:
                return None
            angles = halves[0]
            return None if angles is None else _Table(angles, tuple(reversed(steps)))
        scaled = node.op_type == "Mul" and _is_scalar(node.inputs[1])
        if node.op_type not in ("Cast", "Cos", "Sin") and not scaled:
            return None
        steps.append(node)
        current = node.inputs[0]
    return None


def _is_scalar(value: ir.Value | None) -> bool:
    tensor = None if value is None else value.const_value
    return tensor is not None and tensor.size == 1


def _is_rotated(rotated: ir.Value, x: ir.Value) -> bool:
    """Whether `rotated` is Concat(-x₂, x₁)."""
    concat = rotated.producer()
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2:
        return False
    if concat.attributes["axis"].as_int() not in _LAST:
        return False
    negated, first = concat.inputs
    negative = None if negated is None else negated.producer()
    if negative is None or negative.op_type != "Neg":
        return False
    half, size = _half(x), _half(x, whole=True)
    return (
        half is not None
        and size is not None
        and _slice(first, x) == (0, half)
        and _slice(negative.inputs[0], x) == (half, size)
    )


def _slice(value: ir.Value | None, x: ir.Value) -> tuple[int, int] | None:
    """The begin and end of a Slice of the last axis of `x`."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Slice" or node.inputs[0] is not x:
        return None
    numbers = []
    for constant in node.inputs[1:]:
        if constant is None or constant.const_value is None or constant.const_value.size != 1:
            return None
        numbers.append(int(constant_of(constant).item()))
    size = _half(x, whole=True)
    start, end, axis, step = (*numbers, 0, 1)[:4] if len(numbers) > 2 else (0, 0, 0, 0)
    if size is None or axis not in _LAST or step != 1:
        return None
    return start, min(end, size)


def _half(value: ir.Value, *, whole: bool = False) -> int | None:
    """Half of the size of the last axis, or all of it if `whole`."""
    size = None if value.shape is None else value.shape[-1]
    if not isinstance(size, int) or (size % 2 and not whole):
        return None
    return size if whole else size // 2


def _fit(angles: ir.Value, x: ir.Value) -> bool:
    """Whether the angles are [batch, sequence, size / 2] for x [batch, heads, sequence, size]."""
    if angles.shape is None or x.shape is None or len(angles.shape) != _AXES - 1:
        return False
    return (angles.shape[0], angles.shape[1]) == (x.shape[0], x.shape[2]) and (
        _half(angles, whole=True) == _half(x)
    )


def _heads(x: ir.Value) -> int | None:
    heads = x.shape[1] if x.shape is not None and len(x.shape) == _AXES else None
    return heads if isinstance(heads, int) else None


def _on_half(
    graph: ir.Graph,
    table: _Table,
    before: ir.Node,
    made: dict[tuple[ir.Value, tuple[ir.Node, ...]], ir.Value],
) -> ir.Value:
    """The table [batch, sequence, size / 2] of the angles, computed once for all rotations."""
    import onnx_ir as ir

    key = (table.angles, table.steps)
    if key not in made:
        value = table.angles
        for step in table.steps:
            inputs = [value, *step.inputs[1:]]
            attributes = list(step.attributes.values())
            new = ir.Node(step.domain, step.op_type, inputs, attributes, name=f"{step.name}/half")
            value = new.outputs[0]
            value.name, value.type = new.name, step.outputs[0].type
            value.shape = table.angles.shape
            graph.insert_before(before, new)
        made[key] = value
    return made[key]
