"""Find the scales after a MatMulInteger, which turn its integer sums into the layer's output.

    y = Cast(MatMulInteger(Quantize(x), W)) · scale of x · scale of W

The factors may come in any order: multiplied with each other first, as onnxruntime's quantizer
writes them, or with the sums one by one. The layer's output, to which an adapter's update is added,
has all of them; a value between them is scaled differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loradeploy.export.graph.edit import only_user

if TYPE_CHECKING:
    import onnx_ir as ir

_CARRIERS: Final = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True, eq=False)
class Scaling:
    """`output`: the sums times all scales. `weight`: the constant scales of the weight."""

    output: ir.Value
    weight: tuple[ir.Value, ...]


def scaling_of(node: ir.Node) -> Scaling | None:
    """The scaling after the MatMulInteger `node`; None unless all of its scales are found.

    If the scales of x and W are one constant, `weight` is empty, because they are not separable.
    """
    of_x = _scale_of_input(node)
    cast = only_user(node.outputs[0])
    if of_x is None or cast is None or cast.op_type != "Cast":
        return None
    y = cast.outputs[0]
    found: list[ir.Value] = []
    while (mul := _next_product(y)) is not None:
        factors = _factors(mul.inputs[1] if mul.inputs[0] is y else mul.inputs[0])
        if not all(each is of_x or _is_constant(each) for each in factors):
            break
        y = mul.outputs[0]
        found += factors
        if of_x in found and len(found) > 1:
            return Scaling(y, tuple(each for each in found if each is not of_x))
    if len(found) != 1:
        return None
    # One factor: both scales in one constant, or that of x alone if the weight's scale is 1.
    whole = _is_constant(of_x) if found[0] is not of_x else mul is None
    return Scaling(y, ()) if whole else None


def _scale_of_input(node: ir.Node) -> ir.Value | None:
    quantize = None if node.inputs[0] is None else node.inputs[0].producer()
    if quantize is None:
        return None
    if quantize.op_type == "DynamicQuantizeLinear":
        return quantize.outputs[1]
    return quantize.inputs[1] if quantize.op_type == "QuantizeLinear" else None


def _next_product(value: ir.Value) -> ir.Node | None:
    after = only_user(value)
    return after if after is not None and after.op_type == "Mul" else None


def _factors(value: ir.Value | None) -> list[ir.Value]:
    """The factors of `value`; itself if it is not a product."""
    factors, waiting = [], [value]
    while waiting:
        each = waiting.pop()
        node = None if each is None else each.producer()
        if node is not None and node.op_type == "Mul":
            waiting += node.inputs
        elif node is not None and node.op_type in _CARRIERS:
            waiting.append(node.inputs[0])
        elif each is not None:
            factors.append(each)
    return factors


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None
