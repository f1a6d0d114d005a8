"""Fix RMS norms that compute in float32 on states of a narrower dtype, as Gemma's do.

onnxscript's fusion gives the norm the states without a cast, and a scale in float32. The operator's
definition multiplies them without a cast, so that onnxruntime does not open the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def widen_norms(graph: ir.Graph) -> None:
    """Cast the input of an RMSNormalization to the dtype of its scale, which the output has too."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "RMSNormalization" or node.domain != "":
            continue
        x, scale = node.inputs[:2]
        if x is None or scale is None or scale.dtype is None or x.dtype == scale.dtype:
            continue
        cast = ir.node("Cast", [x], attributes={"to": int(scale.dtype)})
        cast.outputs[0].dtype, cast.outputs[0].shape = scale.dtype, x.shape
        cast.metadata_props.update(node.metadata_props)
        graph.insert_before(node, cast)
        node.replace_input_with(0, cast.outputs[0])
