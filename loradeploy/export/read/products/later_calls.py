"""Give all calls of a module the same weights again, where a tool stored one copy for each call.

torch's older exporter numbers the later calls of a module (/query/MatMul, /query_1/MatMul). Their
weights are one initializer until a quantizer or onnxslim copies them. Two products of these names
with equal weights are calls of one module; with other weights they are two modules. Quantizers may
change the weight of one call alone: then it is only similar.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.export.graph.edit import constant_of
from loradeploy.export.match.modules.naming import at_first_call, module_of
from loradeploy.export.match.products import OPERATORS, Product, products

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx_ir as ir

    from loradeploy.export.match.linears import Linear

# Operators between constants and a product.
_CARRIERS: Final = ("Cast", "DequantizeLinear", "Identity", "Transpose")
# Rows of two weights that are compared, and the cosine from which they count as similar: 4-bit
# weights of normal numbers have 0.99, random rows less than 0.5.
_COMPARED: Final = 16
_PARALLEL: Final = 0.8


def join_later_calls(graph: ir.Graph) -> None:
    """Let later calls use the constants of the first call, if they are equal."""
    first: dict[str, ir.Node] = {}
    later: list[tuple[ir.Node, str]] = []
    for node in graph:
        if node.op_type in OPERATORS and (found := module_of(node)) is not None:
            first.setdefault(found[0], node)
            if (name := at_first_call(found[0])) is not None:
                later.append((node, name))
    for node, name in later:
        other = first.get(name)
        if other is not None and _equal(node.inputs[1:], other.inputs[1:]) and other is not node:
            for index, value in enumerate(other.inputs[1:], start=1):
                if node.inputs[index] is not value:
                    node.replace_input_with(index, value)


def similar_later_calls(
    graph: ir.Graph, linears: Mapping[str, Linear]
) -> Iterator[tuple[Linear, Linear]]:
    """Pairs of linears that may be two calls of one module, by their names and similar weights."""
    by_node = {product.node: product for product in products(graph)}
    for module, linear in linears.items():
        other = linears.get(at_first_call(module) or "")
        if other is not None and _are_similar(by_node[linear.nodes[0]], by_node[other.nodes[0]]):
            yield other, linear


def _are_similar(one: Product, other: Product) -> bool:
    """Whether some rows of two weights are parallel, up to quantization."""
    if (one.in_features, one.out_features) != (other.in_features, other.out_features):
        return False
    picks = list(range(min(_COMPARED, one.out_features)))
    a, b = one.rows(picks), other.rows(picks)
    if a is None or b is None:
        return True  # unknown
    product = float(np.vdot(a, b))
    return product > _PARALLEL * float(np.linalg.norm(a)) * float(np.linalg.norm(b))


def _equal(one: Sequence[ir.Value | None], other: Sequence[ir.Value | None]) -> bool:
    return len(one) == len(other) and all(map(_same, one, other))


def _same(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether two values are equal constants, computed in the same way."""
    if one is other or one is None or other is None:
        return one is other
    a, b = one.producer(), other.producer()
    if a is not None and b is not None:
        alike = (a.op_type, a.domain) == (b.op_type, b.domain) and a.op_type in _CARRIERS
        settings = [{k: v.value for k, v in node.attributes.items()} for node in (a, b)]
        return alike and settings[0] == settings[1] and _equal(a.inputs, b.inputs)
    constants = one.const_value, other.const_value
    if any(constant is None for constant in constants) or not (
        one.is_initializer() and other.is_initializer()
    ):
        return False
    a_type, b_type = (constant.dtype for constant in constants if constant is not None)
    return a_type == b_type and np.array_equal(constant_of(one), constant_of(other))
