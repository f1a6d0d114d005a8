"""The model-local function of an operator: what clients without the library compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

from loradeploy.bundle.names import OPERATOR_DOMAIN
from loradeploy.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir


def function_of(
    name: str,
    inputs: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
    results: Sequence[ir.Value],
    opsets: Mapping[str, int],
    attributes: Mapping[str, ir.AttributeType] | None = None,
) -> ir.Function:
    """The function `name` with the body `nodes`; its attributes have no defaults.

    Outputs without a name get that of their node.
    """
    import onnx_ir as ir

    for node in nodes:
        if node.outputs[0].name is None:
            node.outputs[0].name = node.name
    graph = ir.Graph(inputs, results, nodes=nodes, opset_imports=dict(opsets), name=name)
    own = [ir.Attr(each, kind, None) for each, kind in (attributes or {}).items()]
    return ir.Function(OPERATOR_DOMAIN, name, graph=graph, attributes=own)


def add_function(model: ir.Model, function: ir.Function) -> None:
    """Add the function to the model, which has calls of it."""
    model.functions[function.identifier()] = function


def is_call(node: ir.Node | None, *names: str) -> TypeGuard[ir.Node]:
    """Whether `node` calls one of the operators."""
    return node is not None and node.domain == OPERATOR_DOMAIN and node.op_type in names


def changed_call(call: ir.Node) -> ExportError:
    """The error for a call whose inputs or attributes are not its operator's."""
    return ExportError(f"{call.name} has other inputs than its operator: it was changed")
