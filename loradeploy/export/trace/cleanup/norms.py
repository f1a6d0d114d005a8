"""Fix RMS norms whose states and scale have different dtypes, as Gemma's and T5's in fp16 do.

onnxscript's fusion gives the norm the states without a cast. The operator's definition multiplies
them by the scale without a cast, so that onnxruntime does not open the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loradeploy.export.graph.edit import replace_uses

if TYPE_CHECKING:
    import onnx_ir as ir


def widen_norms(graph: ir.Graph) -> None:
    """Compute each RMSNormalization in the wider dtype; its output has the dtype of its scale.

    Gemma has a scale in float32. T5's states are in float32, since transformers keeps its `wo` so,
    and can exceed the largest number in float16.
    """
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "RMSNormalization" or node.domain != "":
            continue
        x, scale = node.inputs[:2]
        if x is None or scale is None or scale.dtype is None or x.dtype == scale.dtype:
            continue
        if x.dtype is not ir.DataType.FLOAT:
            graph.insert_before(node, cast := _cast(node, x, scale.dtype))
            node.replace_input_with(0, cast.outputs[0])
            continue
        graph.insert_before(node, cast := _cast(node, scale, x.dtype))
        node.replace_input_with(1, cast.outputs[0])
        y = node.outputs[0]
        narrow = _cast(node, y, scale.dtype)
        replace_uses(y, narrow.outputs[0], keep={narrow})
        y.type = ir.TensorType(x.dtype)  # the Cast has the other type object
        graph.insert_after(node, narrow)


def _cast(node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Node:
    """A Cast of `value`, which counts as a part of the module of `node`."""
    import onnx_ir as ir

    cast = ir.node("Cast", [value], attributes={"to": int(dtype)})
    cast.outputs[0].dtype, cast.outputs[0].shape = dtype, value.shape
    cast.metadata_props.update(node.metadata_props)
    return cast
