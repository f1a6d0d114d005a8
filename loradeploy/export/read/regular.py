"""Normalize what exporters write in different ways: constants, inputs with defaults, shapes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.export.graph.edit import (
    add_constant,
    constant_of,
    free_name,
    is_fixed,
    replace_uses,
)
from loradeploy.export.match.products import OPERATORS, input_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray
    from onnx_ir.passes.common import ShapeInferencePass


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


def quantize_constants(graph: ir.Graph) -> None:
    """Replace QuantizeLinear of a constant by the integers, as onnxruntime does.

    Graphs of quantization-aware training quantize their float weights and dequantize them again.
    """
    for node in list(graph):
        if node.op_type == "QuantizeLinear" and (numbers := _quantized(node)) is not None:
            name = free_name(graph, f"{node.outputs[0].name}.integers")
            made = add_constant(graph, name, numbers)
            replace_uses(node.outputs[0], made)
            graph.remove(node, safe=True)


def _quantized(node: ir.Node) -> NDArray[Any] | None:
    """The output of a QuantizeLinear of constants, with 8 or 16 bits; None for other ones."""
    given = [value for value in node.inputs if value is not None and is_fixed(value)]
    if len(given) != 3 or not set(node.attributes) <= {"axis", "saturate"}:
        return None
    if node.outputs[0].is_graph_output():
        return None
    numbers, steps, zeros = map(constant_of, given)
    axis = node.attributes.get("axis")
    if numbers.dtype != np.float32 or zeros.dtype.kind not in "iu":
        return None
    if steps.size == zeros.size == 1:  # also of shape [1], whatever the axis
        steps, zeros = steps.reshape(()), zeros.reshape(())
    else:
        at = 1 if axis is None else axis.as_int()
        own = numbers.shape[at:][:1] if at >= -numbers.ndim else ()
        if not own or not steps.shape == zeros.shape == own:
            return None  # onnxruntime refuses it
        sizes = [1] * numbers.ndim
        sizes[at] = -1
        steps, zeros = steps.reshape(sizes), zeros.reshape(sizes)
    limits = np.iinfo(zeros.dtype)
    rounded = np.rint(numbers / steps) + zeros.astype(np.float32)
    integers: NDArray[Any] = np.clip(rounded, limits.min, limits.max).astype(zeros.dtype)
    return integers


def complete_shapes(model: ir.Model) -> None:
    """Infer missing shapes, if products need them.

    Declared shapes that contradict the operators are dropped: onnxruntime follows the operators.
    Shapes that cannot be inferred, such as after an unknown operator, stay as declared.
    """
    from onnx_ir.passes.common import ShapeInferencePass

    inputs = (value for node in model.graph for value in _multiplied(node))
    if any(value is not None and value.shape is None for value in inputs):
        lift_constants(model)
        if not _inferred(ShapeInferencePass(), model):
            known = [node for node in model.graph if node.domain in _INFERRED]
            values = [value for node in known for value in node.outputs]
            declared = {value: value.shape for value in values if not value.is_graph_output()}
            for value in declared:
                value.shape = None
            _inferred(ShapeInferencePass(check_type=False, strict_mode=False), model)
            for value, shape in declared.items():
                if value.shape is None:
                    value.shape = shape


def _inferred(inference: ShapeInferencePass, model: ir.Model) -> bool:
    """Infer shapes; return whether it succeeded, which onnx-ir reports in its log only."""
    failures = _Failures()
    passes = logging.getLogger(type(inference).__module__)
    passes.addFilter(failures)
    try:
        inference(model)
    finally:
        passes.removeFilter(failures)
    return not failures.seen


# ONNX's own operators, whose shapes inference knows.
_INFERRED: Final = ("", "ai.onnx")
# The begin of onnx-ir's log message, with a traceback, for a failed inference.
_FAILED: Final = "Shape inference failed"


class _Failures(logging.Filter):
    """Drops onnx-ir's log messages about failures, and records that there were any."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Record and drop the message of a failure."""
        failed = str(record.msg).startswith(_FAILED)
        self.seen = self.seen or failed
        return not failed


def _multiplied(node: ir.Node) -> list[ir.Value | None]:
    """The inputs of a product that may not be its weight, which can be on the left."""
    if node.op_type == "Conv":
        return [node.inputs[0]]
    if node.op_type not in OPERATORS:
        return []
    first = node.inputs[0]
    behind = node.op_type == "MatMul" and first is not None and first.is_initializer()
    return [input_of(node), *(node.inputs[1:2] if behind else ())]


def complete_outputs(graph: ir.Graph, shapes: Mapping[str, Sequence[int | str | None]]) -> None:
    """Set the shapes of outputs that declare none to the `shapes` that onnxruntime infers."""
    import onnx_ir as ir

    for value in graph.outputs:
        found = shapes.get(str(value.name))
        if found and value.shape is None:
            value.shape = ir.Shape(found)


def remove_weight_inputs(model: ir.Model) -> None:
    """Remove weights from the inputs: old exporters also list them there, with a default."""
    for value in list(model.graph.inputs):
        if value.is_initializer():
            model.graph.inputs.remove(value)
