"""Normalize what exporters write in different ways: constants, inputs with defaults, shapes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from loradeploy.export.match.products import OPERATORS, input_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir


def lift_constants(model: ir.Model) -> None:
    """Turn Constant nodes into initializers, so that all weights are initializers.

    Some exporters also declare wrong shapes for them, which makes shape inference fail.
    """
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def drop_identities(model: ir.Model) -> None:
    """Remove Identity nodes after constants.

    torch.onnx's older exporter inserts one for a weight or bias that equals another.
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
    """Infer missing shapes, if products need them.

    Declared shapes that contradict the operators are dropped: onnxruntime follows the operators.
    """
    from onnx_ir.passes.common import ShapeInferencePass

    inputs = (value for node in model.graph for value in _multiplied(node))
    if any(value is not None and value.shape is None for value in inputs):
        lift_constants(model)
        failures = _Failures()
        passes = logging.getLogger(ShapeInferencePass.__module__)
        passes.addFilter(failures)
        try:
            ShapeInferencePass()(model)
        finally:
            passes.removeFilter(failures)
        if failures.seen:
            for value in (value for node in model.graph for value in node.outputs):
                if not value.is_graph_output():
                    value.shape = None
            ShapeInferencePass(check_type=False, strict_mode=False)(model)


class _Failures(logging.Filter):
    """Keeps to itself what onnx-ir logs of a failure, with a traceback, instead of raising it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Note the record, and drop it."""
        self.seen = True
        return False


def _multiplied(node: ir.Node) -> list[ir.Value | None]:
    """What a product takes besides its weight, which may stand in front."""
    if node.op_type == "Conv":
        return [node.inputs[0]]
    if node.op_type not in OPERATORS:
        return []
    first = node.inputs[0]
    behind = node.op_type == "MatMul" and first is not None and first.is_initializer()
    return [input_of(node), *(node.inputs[1:2] if behind else ())]


def complete_outputs(graph: ir.Graph, shapes: Mapping[str, Sequence[int | str | None]]) -> None:
    """Give outputs the `shapes` that onnxruntime finds, where they declare none."""
    import onnx_ir as ir

    for value in graph.outputs:
        found = shapes.get(str(value.name))
        if found and value.shape is None:
            value.shape = ir.Shape(found)


def close_inputs(model: ir.Model) -> None:
    """Remove weights from the inputs, where old exporters also list them with a default."""
    for value in list(model.graph.inputs):
        if value.is_initializer():
            model.graph.inputs.remove(value)
