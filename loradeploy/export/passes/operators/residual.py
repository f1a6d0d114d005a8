"""Make an update and the residual addition after it one call.

    Add(residual, LoraAdd(y, …))  →  LoraAddResidual(y, …, residual)

The sum of y and its update is not written and read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from loradeploy.bundle.names import (
    ADAPTER_IDS,
    ADAPTER_RANKS,
    LORA_ADD_OPERATOR,
    LORA_ADD_RESIDUAL_OPERATOR,
    OPERATOR_DOMAIN,
    lora_a_name,
)
from loradeploy.export.graph.edit import only_user, replace_node
from loradeploy.export.graph.file import opset_of
from loradeploy.export.graph.names import LORA_ADD, step_name
from loradeploy.export.passes.operators.function import (
    add_function,
    changed_call,
    function_of,
    is_call,
)
from loradeploy.export.passes.operators.lora_add import TARGET, update_nodes

if TYPE_CHECKING:
    import onnx_ir as ir

_A: Final = 2  # the input of a call
_INPUTS: Final = 7


def use_residual(model: ir.Model) -> None:
    """Replace calls of LoraAdd that only an addition of the same shape uses; add the function."""
    import onnx_ir as ir

    found = list(_sums(model.graph))
    for add, update, residual in found:
        call = ir.node(
            LORA_ADD_RESIDUAL_OPERATOR,
            [*update.inputs, residual],
            attributes={TARGET: update.attributes[TARGET].as_int()},
            domain=OPERATOR_DOMAIN,
            name=add.name,
        )
        call.metadata_props.update(add.metadata_props)
        replace_node(add, [call])
        assert update.graph is not None
        update.graph.remove(update, safe=True)
    if found:
        add_function(model, _function(opset_of(model)))


def remove_residual(model: ir.Model) -> None:
    """Undo `use_residual`, except for the function.

    Raises:
        ExportError: a call was changed.
    """
    import onnx_ir as ir

    calls = [n for n in model.graph.all_nodes() if is_call(n, LORA_ADD_RESIDUAL_OPERATOR)]
    for call in calls:
        inputs = [value for value in call.inputs if value is not None]
        if len(inputs) != _INPUTS or TARGET not in call.attributes:
            raise changed_call(call)
        *given, residual = inputs
        update = ir.node(
            LORA_ADD_OPERATOR,
            given,
            attributes={TARGET: call.attributes[TARGET].as_int()},
            domain=OPERATOR_DOMAIN,
            name=_name(model.graph, call),
        )
        value, result = update.outputs[0], call.outputs[0]
        value.name, value.type, value.shape = update.name, result.type, result.shape
        add = ir.node("Add", [residual, value], name=call.name)
        add.metadata_props.update(call.metadata_props)
        replace_node(call, [update, add])


def _sums(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node, ir.Value]]:
    """Additions, the update that each adds, and the other value, in branches too."""
    import onnx_ir as ir

    for update in graph.all_nodes():
        if not is_call(update, LORA_ADD_OPERATOR):
            continue
        result = update.outputs[0]
        add = only_user(result)
        if add is None or (add.domain, add.op_type) != ("", "Add") or add.graph is not update.graph:
            continue
        residual = add.inputs[1] if add.inputs[0] is result else add.inputs[0]
        if residual is None or residual.is_initializer() or residual.shape is None:
            continue
        known = not residual.shape.has_unknown_dim() and residual.shape == result.shape
        named = update.name == _name(graph, update) and not update.metadata_props
        if known and named and residual.dtype == ir.DataType.FLOAT:
            yield add, update, residual


def _name(graph: ir.Graph, call: ir.Node) -> str | None:
    """The name of the update of a module's first call, by the name of its side input A."""
    A = call.inputs[_A]
    module, suffix = str(None if A is None else A.name), lora_a_name("")
    if not module.endswith(suffix) or call.graph is None:
        return None
    branch = "" if call.graph is graph else f"{call.graph.name}/"
    return step_name(f"{branch}{module.removesuffix(suffix)}", LORA_ADD)


def _function(opset: int) -> ir.Function:
    """The function with the nodes that a call stands for."""
    import onnx_ir as ir

    names = ("y", "x", "A", "B", ADAPTER_IDS, ADAPTER_RANKS, "residual")
    inputs = [ir.Value(name=name) for name in names]
    nodes = update_nodes(*inputs[:5])
    nodes.append(ir.node("Add", [inputs[-1], nodes[-1].outputs[0]], name="result"))
    attributes = {TARGET: ir.AttributeType.INT}
    return function_of(
        LORA_ADD_RESIDUAL_OPERATOR, inputs, nodes, nodes[-1].outputs, {"": opset}, attributes
    )
