"""Make silu(gate) · up, in the feed-forward layers of most decoders, one call.

    Mul(Mul(gate, Sigmoid(gate)), up)                       →  SiluMul(gate, up)
    gate, up = Split(x), then the same, if used here only   →  SwiGLU(x)

The Split is that of a product that fuse.py made of gate and up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loradeploy.bundle.names import OPERATOR_DOMAIN, SILU_MUL_OPERATOR, SWIGLU_OPERATOR
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import only_user, remove_unused, replace_node
from loradeploy.export.graph.file import opset_of
from loradeploy.export.passes.operators.function import (
    add_function,
    changed_call,
    function_of,
    is_call,
)
from loradeploy.export.passes.operators.split import sizes_of, split_again

if TYPE_CHECKING:
    import onnx_ir as ir

_NUM_OUTPUTS: Final = 18  # the first opset whose Split has this attribute
_HALVES: Final = 2


@dataclass(frozen=True, eq=False)
class _Gated:
    """The nodes of silu(gate) · up; `last` computes it."""

    sigmoid: ir.Node
    silu: ir.Node
    last: ir.Node

    # Read from the nodes: another call may have replaced the values.
    @property
    def gate(self) -> ir.Value | None:
        return self.sigmoid.inputs[0]

    @property
    def up(self) -> ir.Value | None:
        return _other(self.last, self.silu.outputs[0])


def use_gated(model: ir.Model) -> None:
    """Make the calls, and add their functions."""
    import onnx_ir as ir

    opset = opset_of(model)
    names: dict[str, None] = {}
    for found in list(_gated(model.graph)):
        x = _whole(found) if opset >= _NUM_OUTPUTS else None
        name = SILU_MUL_OPERATOR if x is None else SWIGLU_OPERATOR
        inputs = [found.gate, found.up] if x is None else [x]
        call = ir.node(name, inputs, domain=OPERATOR_DOMAIN, name=found.last.name)
        call.metadata_props.update(found.last.metadata_props)
        replace_node(found.last, [call])
        names[name] = None
    for name in names:
        add_function(model, _function(name, opset))
    remove_unused(model.graph)


def remove_gated(model: ir.Model) -> None:
    """Undo `use_gated`, except for the functions.

    Raises:
        ExportError: a call has other inputs.
    """
    for call in list(model.graph.all_nodes()):
        if not is_call(call, SILU_MUL_OPERATOR, SWIGLU_OPERATOR):
            continue
        inputs = [value for value in call.inputs if value is not None]
        if len(inputs) != (1 if call.op_type == SWIGLU_OPERATOR else _HALVES):
            raise changed_call(call)
        before = [] if len(inputs) > 1 else [_split_again(model.graph, call, inputs[0])]
        gate, up = before[0].outputs if before else inputs
        nodes = gated_nodes(gate, up)
        label = call.name or call.outputs[0].name  # nodes of other exporters may have no name
        for node in nodes[:-1]:
            node.name = node.outputs[0].name = f"{label}/{node.name}"
        for value in (gate, up, *(node.outputs[0] for node in nodes[:-1])):
            if value.type is None:
                value.type, value.shape = call.outputs[0].type, call.outputs[0].shape
        nodes[-1].name = call.name
        nodes[-1].metadata_props.update(call.metadata_props)
        replace_node(call, [*before, *nodes])


def _gated(graph: ir.Graph) -> Iterator[_Gated]:
    """silu(gate) · up in the graph and its branches, in float32 and of one known shape."""
    import onnx_ir as ir

    for sigmoid in graph.all_nodes():
        if (sigmoid.domain, sigmoid.op_type) != ("", "Sigmoid"):
            continue
        silu = _product(sigmoid.outputs[0])
        last = None if silu is None else _product(silu.outputs[0])
        if silu is None or last is None:
            continue
        found = _Gated(sigmoid, silu, last)
        gate, up = found.gate, found.up
        if gate is None or up is None or gate.shape is None:
            continue
        if _other(silu, sigmoid.outputs[0]) is not gate:
            continue
        known = not gate.shape.has_unknown_dim() and gate.shape == up.shape
        if known and all(value.dtype == ir.DataType.FLOAT for value in (gate, up)):
            yield found


def _product(value: ir.Value) -> ir.Node | None:
    """The multiplication that alone uses `value`."""
    node = only_user(value)
    return node if node is not None and (node.domain, node.op_type) == ("", "Mul") else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other factor of a product."""
    first, second = node.inputs
    return second if first is value else first


def _whole(found: _Gated) -> ir.Value | None:
    """The value whose halves are gate and up, if `split_again` can divide it again."""
    gate, up = found.gate, found.up
    split = None if gate is None else gate.producer()
    if split is None or up is None or split is not up.producer():
        return None
    sizes = sizes_of(split)
    users = {use.node for value in split.outputs for use in value.uses()}
    outputs = list(split.outputs) == [gate, up] and not any(
        value.is_graph_output() for value in split.outputs
    )
    own = {found.sigmoid, found.silu, found.last}
    if sizes is None or not outputs or users != own or sizes[0] != sizes[1]:
        return None
    return split.inputs[0]


def _split_again(graph: ir.Graph, call: ir.Node, x: ir.Value) -> ir.Node:
    """The Split of fuse.py that a SwiGLU replaced."""
    size = None if x.shape is None else x.shape[-1]
    if not isinstance(size, int) or size % _HALVES:
        raise ExportError(f"{call.name} divides no product of two layers: it was changed")
    return split_again(graph, call, x, [size // _HALVES] * _HALVES)


def gated_nodes(gate: ir.Value, up: ir.Value) -> list[ir.Node]:
    """The nodes of silu(gate) · up; the last computes it."""
    import onnx_ir as ir

    sigmoid = ir.node("Sigmoid", [gate], name="sigmoid")
    silu = ir.node("Mul", [gate, sigmoid.outputs[0]], name="silu")
    return [sigmoid, silu, ir.node("Mul", [silu.outputs[0], up], name="result")]


def _function(name: str, opset: int) -> ir.Function:
    """The function with the nodes that a call stands for."""
    import onnx_ir as ir

    if name == SILU_MUL_OPERATOR:
        inputs = [ir.Value(name=each) for each in ("gate", "up")]
        nodes = gated_nodes(*inputs)
    else:
        inputs = [ir.Value(name="x")]
        attributes = {"axis": -1, "num_outputs": _HALVES}
        split = ir.node("Split", inputs, attributes=attributes, num_outputs=_HALVES)
        for value, part in zip(split.outputs, ("gate", "up"), strict=True):
            value.name = part
        nodes = [split, *gated_nodes(*split.outputs)]
    return function_of(name, inputs, nodes, nodes[-1].outputs, {"": opset})
