"""Convert graphs of older opsets to one with the operators that an export adds.

    opset 7 … 12               →   opset 13
    a part of an older opset   →   that of the others

From 13 on Split, Squeeze and Unsqueeze take sizes and axes as inputs, like the nodes that side
inputs and merges add. onnx's converter gets the graph without its large weights, which stay on
disk, whatever their size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loradeploy.errors import ExportError, MissingDependencyError, first_line
from loradeploy.export.graph.file import opset_of
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logger_of(__name__)

# The version of the nodes that an export adds.
LEAST_OPSET: Final = 13
# Initializers with a default that an input may override came with IR 4; opset 13 with IR 7.
_LEAST_IR: Final = 7
# The converter may read smaller constants (an axis, a size); it never reads a weight.
_LARGE_BYTES: Final = 4096


def convert_opset(model: ir.Model, target: int = LEAST_OPSET) -> ir.Model:
    """Convert `model` to the opset `target` if it is older, and raise its IR version if needed.

    Raises:
        ExportError: the graph does not declare its opset, or cannot be converted.
        MissingDependencyError: onnx is not installed.
    """
    opset = opset_of(model)
    if not opset:
        raise ExportError("the graph does not specify which opset it is of: export it again")
    model.opset_imports.pop("ai.onnx", None)  # another spelling of the default domain
    model.opset_imports[""] = opset
    if opset < target:
        logger.info("converting the graph from opset %d to %d", opset, target)
        model = _converted(model, opset, target)
    model.ir_version = max(model.ir_version or 0, _LEAST_IR)
    return model


def _converted(model: ir.Model, opset: int, target: int) -> ir.Model:
    import onnx_ir as ir

    try:
        import onnx.version_converter
    except ImportError:
        raise MissingDependencyError(
            f"the graph is of opset {opset}, and converting it needs onnx:"
            " pip install 'loradeploy[export]'"
        ) from None
    if model.functions:
        raise _refused(opset, target, "it has functions of its own")
    order = [value.name for value in model.graph.inputs]
    weights = _take_out_weights(model.graph)
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(model), target)
        converted = ir.from_proto(proto)
    except Exception as problem:  # the converter's own errors, and protobuf's
        raise _refused(opset, target, first_line(problem)) from None
    _put_back_weights(converted.graph, weights)
    if [value.name for value in converted.graph.inputs] != order:
        raise _refused(opset, target, "its inputs have changed on the way")
    return converted


def _take_out_weights(graph: ir.Graph) -> dict[str, ir.Value]:
    """Turn the large initializers into inputs, and return them by name."""
    taken = {
        name: value
        for name, value in graph.initializers.items()
        if value.const_value is not None
        and value.const_value.nbytes >= _LARGE_BYTES
        and not value.is_graph_input()
    }
    for name, value in taken.items():
        graph.initializers.pop(name)
        tensor = value.const_value
        assert tensor is not None
        value.dtype, value.shape = tensor.dtype, tensor.shape  # type: ignore[assignment]
        graph.inputs.append(value)
    return taken


def _put_back_weights(graph: ir.Graph, weights: dict[str, ir.Value]) -> None:
    for value in list(graph.inputs):
        weight = weights.get(str(value.name))
        if weight is not None:
            graph.inputs.remove(value)
            value.const_value = weight.const_value
            graph.register_initializer(value)


def _refused(opset: int, target: int, reason: str) -> ExportError:
    return ExportError(
        f"the graph is of opset {opset} and cannot be converted to {target}: {reason};"
        f" export it again with opset {target} or later"
    )
