"""What exporters write in several ways, written in one: constants, inputs with defaults, shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loradeploy.export.match.products import OPERATORS, input_of

if TYPE_CHECKING:
    import onnx_ir as ir


def lift_constants(model: ir.Model) -> None:
    """Make initializers of Constant nodes, so that weights are looked for in one place.

    Some exporters state wrong shapes of them too, at which the inference of shapes gives up.
    """
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def drop_identities(model: ir.Model) -> None:
    """Let constants behind Identity nodes be used as they are.

    torch.onnx's older exporter puts one there for a weight or bias that equals another's.
    """
    graph = model.graph
    for node in list(graph):
        constant, same = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Identity" or constant is None or same.is_graph_output():
            continue
        if constant.is_initializer() and not constant.is_graph_input():
            same.replace_all_uses_with(constant)
            graph.remove(node, safe=True)


def complete_shapes(model: ir.Model) -> None:
    """Infer the shapes that a graph does not tell, where products need theirs."""
    from onnx_ir.passes.common import ShapeInferencePass

    inputs = (input_of(node) for node in model.graph if node.op_type in OPERATORS)
    if any(value is not None and value.shape is None for value in inputs):
        lift_constants(model)
        ShapeInferencePass()(model)


def close_inputs(model: ir.Model) -> None:
    """Make constants of the weights that old exporters list as inputs with a default too."""
    for value in list(model.graph.inputs):
        if value.is_initializer():
            model.graph.inputs.remove(value)
