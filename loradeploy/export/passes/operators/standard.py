"""Operators that stand for one standard node each, with its name, inputs and attributes.

A call is the node in the domain loradeploy; the body of its function is the node in its own domain.
The table has the nodes that the kernels compute. All others keep their domain: of other types, bits
or attributes, with further inputs, or with an unknown type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from loradeploy.bundle.names import (
    ATTENTION_OPERATOR,
    GROUP_QUERY_ATTENTION_OPERATOR,
    MAT_MUL_N_BITS_OPERATOR,
    OPERATOR_DOMAIN,
)
from loradeploy.export.graph.edit import attributes_of
from loradeploy.export.graph.file import opset_of
from loradeploy.export.match.operators import MICROSOFT
from loradeploy.export.passes.operators.function import add_function, function_of, is_call

if TYPE_CHECKING:
    import onnx_ir as ir

_BITS: Final = (4, 8)
_INT8_ACTIVATIONS: Final = 4  # accuracy_level of a MatMulNBits
_BLOCKS: Final = (32, 64, 128)
_FLOAT: Final = 1  # ONNX's number of the type
_HEADS_AXES: Final = 4  # [batch, heads, sequence, size]


@dataclass(frozen=True)
class StandardNode:
    """A row: the operator `name` stands for the node of this name in `domain`.

    `inputs`: the numbers of inputs that the kernel takes. `outputs`: the number of its outputs,
    none of which may be left out. `attributes`: those that it reads; others must have the value in
    `fixed`, or be left out. `computes`: the other conditions.
    """

    name: str
    domain: str
    inputs: tuple[int, ...]
    outputs: int
    attributes: tuple[str, ...]
    computes: Callable[[ir.Node], bool]
    fixed: Mapping[str, object]


def _is_packed(node: ir.Node) -> bool:
    """Whether a MatMulNBits multiplies by constant weights of known bits and blocks."""
    import onnx_ir as ir

    given = attributes_of(node)
    A, _, scales, *zeros = node.inputs
    return (
        given.get("bits", _BITS[0]) in _BITS
        and given.get("block_size") in _BLOCKS
        and all(value is not None and _is_constant(value) for value in node.inputs[1:])
        and _are_float(A, scales)
        and all(value is not None and value.dtype == ir.DataType.UINT8 for value in zeros)
    )


def _has_heads_first(node: ir.Node) -> bool:
    """Whether an Attention is of [batch, heads, sequence, size] in float32, without a cache."""
    import onnx_ir as ir

    query, keys, values = node.inputs[:3]
    mask = node.inputs[3] if len(node.inputs) > len(("query", "keys", "values")) else None
    return (
        all(
            value is not None and value.shape is not None and len(value.shape) == _HEADS_AXES
            for value in (query, keys, values)
        )
        and _are_float(query, keys, values)
        and (mask is None or mask.dtype in (ir.DataType.BOOL, ir.DataType.FLOAT))
        and _scales_up(node)
    )


def _has_cache(node: ir.Node) -> bool:
    """Whether a GroupQueryAttention adds to a cache in float32, with heads side by side."""
    return _are_float(*node.inputs[:5]) and _scales_up(node)


def _scales_up(node: ir.Node) -> bool:
    """Whether an attention has no negative factors."""
    given = attributes_of(node)
    return all(given.get(name, 0) >= 0 for name in ("scale", "softcap"))


ROWS: Final = (
    StandardNode(
        MAT_MUL_N_BITS_OPERATOR,
        MICROSOFT,
        (3, 4),
        1,
        ("K", "N", "bits", "block_size"),
        _is_packed,
        MappingProxyType({"accuracy_level": _INT8_ACTIVATIONS}),
    ),
    StandardNode(
        ATTENTION_OPERATOR,
        "",
        (3, 4),
        1,
        ("scale", "softcap"),
        _has_heads_first,
        MappingProxyType({"is_causal": 0, "qk_matmul_output_mode": 0, "softmax_precision": _FLOAT}),
    ),
    StandardNode(
        GROUP_QUERY_ATTENTION_OPERATOR,
        MICROSOFT,
        (7,),
        3,
        ("num_heads", "kv_num_heads", "scale", "softcap"),
        _has_cache,
        MappingProxyType({"do_rotary": 0, "local_window_size": -1, "smooth_softmax": 0}),
    ),
)
# Attributes whose default is not what the kernel computes.
_NEEDED: Final = frozenset({"accuracy_level"})


def use_standard(model: ir.Model, row: StandardNode) -> None:
    """Make the nodes of `row` calls, and add its function."""
    nodes = [node for node in model.graph.all_nodes() if _fits(node, row)]
    if not nodes:
        return
    version = opset_of(model) if row.domain == "" else model.opset_imports[row.domain]
    add_function(model, _function(row, version, nodes))
    for node in nodes:
        node.domain = OPERATOR_DOMAIN


def remove_standard(model: ir.Model, row: StandardNode) -> None:
    """Undo `use_standard`, except for the function."""
    for node in model.graph.all_nodes():
        if is_call(node, row.name):
            node.domain = row.domain


def _fits(node: ir.Node, row: StandardNode) -> bool:
    """Whether the kernel of `row` computes the node."""
    if node.op_type != row.name or node.domain not in (row.domain, row.domain or "ai.onnx"):
        return False
    given = attributes_of(node)
    known = all(
        name in row.attributes or (name in row.fixed and value == row.fixed[name])
        for name, value in given.items()
    )
    required = all(name in given for name in _NEEDED & row.fixed.keys())
    inputs = len(node.inputs) in row.inputs and all(value is not None for value in node.inputs)
    outputs = len(node.outputs) == row.outputs and all(value.name for value in node.outputs)
    return known and required and inputs and outputs and row.computes(node)


def _are_float(*values: ir.Value | None) -> bool:
    """Whether all values are known to be in float32."""
    import onnx_ir as ir

    return all(value is not None and value.dtype == ir.DataType.FLOAT for value in values)


def _is_constant(value: ir.Value) -> bool:
    """Whether no feed can change the value."""
    return value.const_value is not None and not value.is_graph_input()


def _function(row: StandardNode, version: int, nodes: Sequence[ir.Node]) -> ir.Function:
    """The function whose body is the node of `row`, for all calls that `nodes` become.

    It has all attributes of the calls; those that a call lacks are left out of its node too.
    """
    import onnx_ir as ir

    inputs = [ir.Value(name=f"input_{n}") for n in range(max(len(n.inputs) for n in nodes))]
    types = {name: own.type for node in nodes for name, own in node.attributes.items()}
    body = ir.Node(
        row.domain,
        row.name,
        inputs,
        [ir.RefAttr(name, name, kind) for name, kind in types.items()],
        num_outputs=row.outputs,
    )
    for number, output in enumerate(body.outputs):
        output.name = f"output_{number}"
    return function_of(row.name, inputs, [body], body.outputs, {row.domain: version}, types)
