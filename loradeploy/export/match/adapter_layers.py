"""Refuse graphs that compute an adapter themselves: another of the same would be added twice.

By names, as those of PEFT's layers; and by what is computed, where the names are gone:

    x W (+ b) + s · (x A) B        with A [in, rank], B [rank, out] of a rank below both
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from loradeploy.adapter.files.base_files import peft_parts
from loradeploy.errors import ExportError, shortened
from loradeploy.export.graph.scopes import NAME_SCOPES
from loradeploy.export.match.products import Product, describe, input_of, output_of, products

if TYPE_CHECKING:
    import onnx_ir as ir

_SEPARATORS: Final = re.compile(r"[/'\", \[\]]+")  # of the parts of a path, and of several paths
# What a value passes between products: constants are added to it, or it is scaled by them.
_CARRIERS: Final = ("Add", "Cast", "Div", "Dropout", "Identity", "Mul", "Reshape")
_REMEDY: Final = (
    "export the model without it (PEFT: unload(), or merge_and_unload() to keep it;"
    " onnxruntime-genai: without adapter_path)"
)


def refuse_adapter_layers(model: ir.Model) -> None:
    """Raise ExportError where the graph computes an adapter as layers of its own, as PEFT does."""
    names: list[str | None] = list(model.graph.initializers)
    for node in model.graph.all_nodes():
        names += [node.name, node.metadata_props.get(NAME_SCOPES)]
    steps = {_SEPARATORS.sub(".", name) for name in names if name}
    if parts := peft_parts(steps):
        raise ExportError(
            f"the graph contains an adapter as separate layers ({shortened(parts[0], 80)}), so it"
            f" is not a base: {_REMEDY}"
        )


def refuse_adapter_products(graph: ir.Graph) -> None:
    """Raise ExportError where two products of a low rank are added to another of the same input."""
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
    """Whether B(A(x)) is an update of a low rank of the product `base` of x."""
    if A.out_features != B.in_features or B.out_features != base.out_features:
        return False
    low = A.out_features < min(base.in_features, base.out_features)
    return low and _before(input_of(A.node)) is _before(input_of(base.node))


def _before(value: ir.Value | None) -> ir.Value | None:
    """The value that `value` is of another type or shape."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in ("Cast", "Dropout", "Identity", "Reshape"):
            return value
        value = node.inputs[0]
    return value


def _product_behind(value: ir.Value | None, made: Mapping[ir.Value, Product]) -> Product | None:
    """The product that `value` is of, with constants added or multiplied."""
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
