"""Activations that a graph holds within fixed ranges, which were measured on the base.

    y = Dequantize(Quantize(x, scale, zero))     x is cut off at the ends of the scale's range

A static quantization has them. Where an adapter makes activations larger than the base's, they are
cut off: its effect is smaller than in PyTorch then, and only a comparison shows by how much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loradeploy.export.graph.edit import source_of
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logger_of(__name__)

_CARRIERS: Final = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def warn_of_ranges(graph: ir.Graph) -> None:
    """Say how many activations are held in fixed ranges, where any are."""
    count = sum(map(_holds, graph))
    if count:
        logger.warning(
            "%d activations of the graph are quantized in ranges that were measured on the base"
            " (QuantizeLinear): what an adapter makes larger is cut off; compare the bundle with"
            " PyTorch (loradeploy parity)",
            count,
        )


def _holds(node: ir.Node) -> bool:
    if node.op_type != "QuantizeLinear":
        return False
    x, scale = (source_of(value, _CARRIERS) for value in node.inputs[:2])
    # Of what is computed in the graph nothing is its source.
    computed = x is None or not x.is_initializer()
    return computed and scale is not None and scale.is_initializer()
