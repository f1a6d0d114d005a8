"""Factors that a layer has of its own, beside its product.

    y = s · (x W + b)      a layer that scales what it gives; or W was divided by s, to be quantized
    y = (s · x) W + b      SmoothQuant, which divides the rows of W by s

The node of the factor is in the layer's own scope, by its name or metadata, so that it is a part of
the module to which PEFT adds an update. What is added to the product would be scaled with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from loradeploy.export.graph.edit import only_user
from loradeploy.export.match.naming import is_built, module_of
from loradeploy.export.match.products import input_of, output_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.export.match.linears import Linear

_SCALES: Final = ("Div", "Mul")


def own_factor(linear: Linear) -> ir.Node | None:
    """The node that scales the input or output of `linear` inside of its module, if there is one.

    onnxruntime-genai's builder writes factors of the logits into the scope of the head: these are
    the model's.
    """
    for product in linear.nodes:
        own = module_of(product)
        if own is None or is_built(product):
            continue
        for node in _beside(product):
            scope = module_of(node)
            if scope is not None and scope[0] == own[0] and any(map(_is_constant, node.inputs)):
                return node
    return None


def _beside(product: ir.Node) -> Iterator[ir.Node]:
    """The nodes that scale what the product takes, and what it gives with or without its bias."""
    x, y = input_of(product), output_of(product)
    before = None if x is None else x.producer()
    behind = [only_user(y)]
    if behind[0] is not None and behind[0].op_type == "Add":
        behind.append(only_user(behind[0].outputs[0]))
    yield from (
        node
        for node in (before, *behind)
        if node is not None and node.op_type in _SCALES and node.domain == ""
    )


def _is_constant(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.is_initializer()
        and not value.is_graph_input()
        and value.const_value is not None
    )
