"""The Split of a product that fuse.py made of several layers: calls replace it and make it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import shared_constant
from loradeploy.export.graph.names import FUSED_SPLIT, modules_of_label, output_name, step_name

if TYPE_CHECKING:
    import onnx_ir as ir

_PRODUCT: Final = "/MatMul"


def modules_of(y: ir.Value) -> list[str]:
    """The modules that the product y computes, in a branch after the branch's name."""
    return modules_of_label(label_of_product(y))


def label_of_product(y: ir.Value) -> str:
    """The label of the product y, in a branch after the branch's name."""
    product = y.producer()
    return "" if product is None else str(product.name).removesuffix(_PRODUCT)


def sizes_of(split: ir.Node) -> list[int] | None:
    """The sizes of the parts, if `split_again` can make the Split again."""
    y, sizes = (*split.inputs, None)[:2]
    if split.op_type != "Split" or y is None or sizes is None or sizes.const_value is None:
        return None
    names = [output_name(module) for module in modules_of(y)]
    known = (
        split.name == step_name(label_of_product(y), FUSED_SPLIT)
        and [value.name for value in split.outputs] == names
        and sizes.name == _sizes_name(y, split)
    )
    return [int(size) for size in sizes.const_value.numpy()] if known else None


def split_again(graph: ir.Graph, call: ir.Node, y: ir.Value, sizes: Sequence[int]) -> ir.Node:
    """The Split of y that `call` replaced.

    Raises:
        ExportError: y is not a product of as many layers.
    """
    import onnx_ir as ir

    names = [output_name(module) for module in modules_of(y)]
    total = sum(sizes) if y.shape is None else y.shape[-1]
    if len(names) != len(sizes) or total != sum(sizes):
        raise ExportError(f"{call.name} divides no product of its layers: it was changed")
    constant = shared_constant(graph, _sizes_name(y, call), np.array(sizes, np.int64))
    split = ir.node(
        "Split",
        [y, constant],
        attributes={"axis": -1},
        num_outputs=len(sizes),
        name=step_name(label_of_product(y), FUSED_SPLIT),
    )
    for value, name, size in zip(split.outputs, names, sizes, strict=True):
        value.name, value.type = name, y.type
        value.shape = None if y.shape is None else ir.Shape([*list(y.shape)[:-1], size])
    return split


def _sizes_name(y: ir.Value, node: ir.Node) -> str:
    """The name of the sizes of the product's parts, which branches share."""
    assert node.graph is not None
    return f"{label_of_product(y).removeprefix(f'{node.graph.name}/')}.sizes"
