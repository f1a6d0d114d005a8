"""The precisions of an export, and how a graph gets there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from loradeploy.errors import UsageError
from loradeploy.export.match.products import products

if TYPE_CHECKING:
    import onnx_ir as ir

DEFAULT_PRECISION: Final = "fp32"

# The bits of weights that are packed after surgery or merge.
PACKED_BITS: Final[Mapping[str, int]] = {"int8": 8, "int4": 4}
BFLOAT16: Final = "bf16"  # how weights are held after surgery or merge; they compute in fp32
PRECISIONS: Final = ("fp32", "fp16", BFLOAT16, *PACKED_BITS)


def check_precision(precision: str) -> None:
    """Raise UsageError for an unknown precision."""
    if precision not in PRECISIONS:
        raise UsageError(f"the precision {precision!r} is none of {', '.join(PRECISIONS)}")


def precision_of(model: ir.Model) -> str:
    """The precision of a graph's products, as one of `PRECISIONS` where it is one."""
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
    weights = [p.weight.const_value for p in products(model.graph) if p.quantised]
    if weights:
        few = (ir.DataType.INT4, ir.DataType.UINT4)
        return "int4" if any(w is not None and w.dtype in few for w in weights) else "int8"
    return DEFAULT_PRECISION
