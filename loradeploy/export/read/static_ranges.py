"""Activations that a graph clips to fixed ranges, which were measured on the base.

    y = Dequantize(Quantize(x, scale, zero))     x is clipped to the range of the scale

Static quantization does this. If an adapter makes activations larger than the base's, they are
clipped: its effect is smaller than in PyTorch. An export warns of them, and its trial measures by
how much the effect of each adapter changes (`trial/ranges.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loradeploy.export.graph.edit import bodies_of, replace_uses, source_of
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logger_of(__name__)

_CARRIERS: Final = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def count_ranges(graph: ir.Graph) -> int:
    """The number of activations that are clipped to fixed ranges."""
    return sum(map(_clips, graph))


def warn_of_ranges(graph: ir.Graph) -> None:
    """Warn of the number of activations that are clipped to fixed ranges, if there are any."""
    if count := count_ranges(graph):
        logger.warning(
            "%d activations of the graph are quantized in ranges that were measured on the base"
            " (QuantizeLinear): what an adapter makes larger is cut off; compare the bundle with"
            " PyTorch (loradeploy parity)",
            count,
        )


def remove_ranges(graph: ir.Graph) -> bool:
    """Use activations unquantized where they are; return whether that changed the graph.

    Those that an operator on integers takes stay quantized.
    """
    removed = False
    for node in list(graph):
        for body in bodies_of(node):
            removed |= remove_ranges(body)
        x = node.inputs[0] if node.inputs and _clips(node) else None
        for dequantize, _ in list(node.outputs[0].uses()) if x is not None else ():
            if dequantize.op_type == "DequantizeLinear":
                assert x is not None
                replace_uses(dequantize.outputs[0], x)
                removed = True
    return removed


def _clips(node: ir.Node) -> bool:
    if node.op_type != "QuantizeLinear":
        return False
    x, scale = (source_of(value, _CARRIERS) for value in node.inputs[:2])
    # `source_of` is None for a value that other operators compute.
    computed = x is None or not x.is_initializer()
    return computed and scale is not None and scale.is_initializer()
