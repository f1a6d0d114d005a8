"""The model-local function of an operator: what clients without the library compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loradeploy.bundle.names import OPERATOR_DOMAIN

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
    """The function `name` with the body `nodes`; its attributes have no defaults."""
    import onnx_ir as ir

    graph = ir.Graph(inputs, results, nodes=nodes, opset_imports=dict(opsets), name=name)
    own = [ir.Attr(each, kind, None) for each, kind in (attributes or {}).items()]
    return ir.Function(OPERATOR_DOMAIN, name, graph=graph, attributes=own)
