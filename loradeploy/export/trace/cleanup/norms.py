"""RMS norms that compute in float32 around states of fewer bits, as Gemma's do.

onnxscript's fusion lets the norm read the states as they are beside a scale of float32, which the
operator's own definition multiplies without a cast: onnxruntime does not open the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def widen_norms(graph: ir.Graph) -> None:
    """Cast what an RMSNormalization reads to the type of its scale, which its output has too."""
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
