"""Load an ONNX file of another exporter in the form that the other steps expect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loradeploy.errors import ExportError
from loradeploy.export.graph.file import load_graph
from loradeploy.export.graph.sound import check_opens
from loradeploy.export.match.adapter_layers import refuse_adapter_layers
from loradeploy.export.match.linears import refuse_side_inputs
from loradeploy.export.read.finite import check_finite_graph
from loradeploy.export.read.opsets import convert_opset
from loradeploy.export.read.regular import (
    complete_outputs,
    drop_identities,
    lift_constants,
    quantize_constants,
    remove_weight_inputs,
)
from loradeploy.export.read.subgraphs import inline_functions
from loradeploy.export.read.values.all_logits import keep_all_logits

if TYPE_CHECKING:
    import onnx_ir as ir


def load_regular(file: Path) -> ir.Model:
    """The graph in `file` without functions, Constant nodes and weights among its inputs.

    Raises:
        ModelError: it is not a valid graph, or has weights that are not finite.
        ExportError: it has side inputs or layers of an adapter already, has strings, or cannot be
            brought into this form.
    """
    graph = load_graph(file)
    complete_outputs(graph.graph, check_opens(file))
    refuse_side_inputs(graph)  # while they are inputs
    _refuse_texts(graph)
    inline_functions(graph)
    refuse_adapter_layers(graph)
    graph = convert_opset(graph)
    lift_constants(graph)
    remove_weight_inputs(graph)
    drop_identities(graph)
    quantize_constants(graph.graph)
    check_finite_graph(graph, file)
    keep_all_logits(graph.graph)
    return graph


def _refuse_texts(graph: ir.Model) -> None:
    """Raise ExportError for inputs and outputs of strings, which a bundle cannot have."""
    import onnx_ir as ir

    for what, values in (("input", graph.graph.inputs), ("output", graph.graph.outputs)):
        for value in values:
            if value.dtype == ir.DataType.STRING:
                raise ExportError(
                    f"the {what} {value.name} of the graph is of strings, and a bundle has numbers"
                    " only: export the model without its tokenizer and its labels"
                )
