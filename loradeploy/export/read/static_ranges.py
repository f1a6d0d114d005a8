"""Warn of activations that a graph clips to fixed ranges, which were measured on the base.

    y = Dequantize(Quantize(x, scale, zero))     x is clipped to the range of the scale

Static quantization does this. If an adapter makes activations larger than the base's, they are
clipped: its effect is smaller than in PyTorch, and only a comparison shows by how much.
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
    """Warn of the number of activations that are clipped to fixed ranges, if there are any."""
    count = sum(map(_clips, graph))
    if count:
        logger.warning(
            "%d activations of the graph are quantized in ranges that were measured on the base"
            " (QuantizeLinear): what an adapter makes larger is cut off; compare the bundle with"
            " PyTorch (loradeploy parity)",
            count,
        )


def _clips(node: ir.Node) -> bool:
    if node.op_type != "QuantizeLinear":
        return False
    x, scale = (source_of(value, _CARRIERS) for value in node.inputs[:2])
    # `source_of` is None for a value that other operators compute.
    computed = x is None or not x.is_initializer()
    return computed and scale is not None and scale.is_initializer()
