"""Refuse graphs that already contain an adapter, which would be applied twice.

Adapters are recognized by names such as those of PEFT's layers, or by their products:

    x W (+ b) + s · (x A) B        with A [in, rank], B [rank, out] of a rank below both
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from loradeploy.adapter.files.base_files import peft_parts
from loradeploy.errors import ExportError, shortened
from loradeploy.export.graph.edit import value_behind
from loradeploy.export.graph.scopes import NAME_SCOPES
from loradeploy.export.match.products import Product, describe, input_of, output_of, products

if TYPE_CHECKING:
    import onnx_ir as ir

_SEPARATORS: Final = re.compile(r"[/'\", \[\]]+")  # between parts of a path, and between paths
# Operators between products, which add or multiply constants.
_PASSING: Final = ("Cast", "Dropout", "Identity", "Reshape")
_CARRIERS: Final = ("Add", "Cast", "Div", "Dropout", "Identity", "Mul", "Reshape")
_REMEDY: Final = (
    "export the model without it (PEFT: unload(), or merge_and_unload() to keep it;"
    " onnxruntime-genai: without adapter_path)"
)


def refuse_adapter_layers(model: ir.Model) -> None:
    """Raise ExportError if the graph has names of an adapter's layers, as PEFT gives them."""
    names: list[str | None] = list(model.graph.initializers)
    names += [value.name for value in model.graph.inputs]  # Olive makes factors inputs
    for node in model.graph.all_nodes():
        names += [node.name, node.metadata_props.get(NAME_SCOPES)]
    steps = {_SEPARATORS.sub(".", name) for name in names if name}
    if parts := peft_parts(steps):
        raise ExportError(
            f"the graph contains an adapter as separate layers ({shortened(parts[0], 80)}), so it"
            f" is not a base: {_REMEDY}"
        )


def refuse_adapter_products(graph: ir.Graph) -> None:
    """Raise ExportError if a low-rank update is added to a product of the same input."""
    made = {output_of(product.node): product for product in products(graph)}
    for node in graph:
        if node.op_type != "Add" or node.domain != "":
            continue
        one, other = (_product_behind(value, made) for value in node.inputs)
        if one is None or other is None:
            continue
        for base, B in ((one, other), (other, one)):
            A = _product_behind(input_of(B.node), made)
            if A is not None and _adapts(base, A, B):
                raise ExportError(
                    f"the graph contains an adapter of rank {A.out_features} beside"
                    f" {describe(base)} ({A.node.name}, {B.node.name}), so it is not a base:"
                    f" {_REMEDY}"
                )


def _adapts(base: Product, A: Product, B: Product) -> bool:
    """Whether B(A(x)) is a low-rank update of the product `base` of x."""
    if A.out_features != B.in_features or B.out_features != base.out_features:
        return False
    low = A.out_features < min(base.in_features, base.out_features)
    x, own = (value_behind(input_of(each.node), _PASSING) for each in (A, base))
    return low and x is own


def _product_behind(value: ir.Value | None, made: Mapping[ir.Value, Product]) -> Product | None:
    """The product that `value` is computed from by adding or multiplying constants only."""
    while value is not None and value not in made:
        node = value.producer()
        if node is None or node.op_type not in _CARRIERS or node.domain != "":
            return None
        computed = [v for v in node.inputs if v is not None and not v.is_initializer()]
        if node.op_type == "Reshape":
            computed = computed[:1]
        if len(computed) != 1:
            return None
        value = computed[0]
    return None if value is None else made[value]
