"""The precisions of an export, and how a graph gets there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loradeploy.bundle.graph_form import BFLOAT16, DEFAULT_PRECISION
from loradeploy.export.match.products import products

if TYPE_CHECKING:
    import onnx_ir as ir


def precision_of(model: ir.Model) -> str:
    """The precision of a graph's products, as one of `graph_form.PRECISIONS` where it is one."""
    import onnx_ir as ir

    bits = {
        node.attributes["bits"].as_int() if "bits" in node.attributes else 4
        for node in model.graph
        if node.op_type == "MatMulNBits"
    }
    if bits:
        return f"int{min(bits)}"
    kinds = {
        value.dtype
        for value in model.graph.initializers.values()
        if value.shape is not None and len(value.shape) == 2 and value.dtype is not None
    }
    for kind, name in ((ir.DataType.FLOAT16, "fp16"), (ir.DataType.BFLOAT16, BFLOAT16)):
        if kind in kinds:
            return name
    weights = [p.weight.const_value for p in products(model.graph) if p.quantized]
    if weights:
        few = (ir.DataType.INT4, ir.DataType.UINT4)
        return "int4" if any(w is not None and w.dtype in few for w in weights) else "int8"
    return DEFAULT_PRECISION
