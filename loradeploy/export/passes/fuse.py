"""Fuse products of the same input: q, k and v; gate and up.

    x W_q, x W_k, x W_v   →   Split(x [W_q W_k W_v])

A decoder at batch 1 spends much of its time between products, so that fewer and larger ones are
faster. Each member keeps separate factors: a joint B would be block diagonal, and its zeros would
be read at every step. Packed weights (MatMulNBits) of equal bits and blocks are joined with their
scales and zero points, so that a bundle that is exported again has the products it had.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.manifest import LoraTarget
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import (
    add_constant,
    add_tensor,
    attributes_of,
    constant_of,
    replace_uses,
)
from loradeploy.export.graph.names import (
    FUSED_SPLIT,
    label_of,
    output_name,
    packed_names,
    step_name,
    weight_name,
)
from loradeploy.export.graph.scopes import linear_scopes
from loradeploy.export.graph.streamed import joined
from loradeploy.export.match.linears import Linear
from loradeploy.export.match.products import output_of, repeated_for_rows
from loradeploy.export.match.quantized import MATMUL_NBITS, packed_bits

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_OUTPUTS: Final = "N"  # the attribute of MatMulNBits
_PACKED_CONSTANTS: Final = 3  # weight, scales and zero points; g_idx and bias are not joined


@dataclass(frozen=True, eq=False)
class Fused:
    """One product with the name `label`, and the `members` that it computes, in order.

    A linear that shares its input with no other is the only member of its product.
    `outputs`: the members' outputs, if the graph splits the product's output; None if it does not,
    as in graphs that come with fused products.
    """

    label: str
    members: tuple[Linear, ...]
    outputs: tuple[ir.Value, ...] | None = None


def fuse_products(
    graph: ir.Graph, linears: Iterable[Linear], *, apart: Collection[str] = ()
) -> list[Fused]:
    """Fuse linears with the same parent module and the same input into one product.

    Modules in `apart` are not fused, nor are linears that are called twice, or whose weight is
    transposed, used elsewhere, or quantized in another way than MatMulNBits without g_idx and bias.
    The order of the linears is kept.
    """
    groups: dict[object, list[Linear]] = {}
    for linear in linears:
        key = _key(linear) if linear.module not in apart else None
        groups.setdefault(linear if key is None else key, []).append(linear)
    return [_product(graph, members) for members in groups.values()]


def separate_products(graph: ir.Graph, targets: Iterable[LoraTarget]) -> list[ir.Value]:
    """Undo `fuse_products` after the side inputs are removed; return the constants of fused nodes.

    Raises:
        ExportError: the graph does not have the products of the targets.
    """
    nodes = {str(node.name): node for node in graph}
    apart: list[ir.Value] = []
    for label, members in products_of(targets):
        if members[0].slice is not None and not came_fused(label, members):
            apart += _separate(graph, label, members, nodes.get(step_name(label, FUSED_SPLIT)))
    return apart


def products_of(targets: Iterable[LoraTarget]) -> list[tuple[str, list[LoraTarget]]]:
    """The products of the targets, with their labels; members in the order of their outputs."""
    grouped: dict[object, list[LoraTarget]] = {}
    for target in targets:
        grouped.setdefault(target if target.slice is None else target.weight, []).append(target)
    products = []
    for members in grouped.values():
        members.sort(key=lambda member: member.slice or (0, 0))
        products.append((label_of([member.module for member in members]), members))
    return products


def came_fused(label: str, members: Sequence[LoraTarget]) -> bool:
    """Whether the product came with the graph: weights fused here are named after the label."""
    return members[0].slice is not None and not members[0].weight.startswith(weight_name(label))


def _key(linear: Linear) -> object:
    """The key that linears must share to be fused; None if this one cannot be fused."""
    if linear.slice is not None:
        return linear.nodes
    (node, *more) = linear.nodes
    x, weight = node.inputs[0], linear.weight
    if more or x is None or node.inputs[1] is not weight:
        return None
    if any(value is not None and len(list(value.uses())) > 1 for value in node.inputs[1:]):
        return None
    if repeated_for_rows(node.outputs[0]) is not None:  # the update is added before the Expand
        return None
    form = _form_of_weight(linear)
    return None if form is None else (x, linear.module.rpartition(".")[0], form)


def _form_of_weight(linear: Linear) -> object:
    """What the weights of a product must have in common; None if they cannot be joined."""
    node = linear.nodes[0]
    if node.op_type == "MatMul" and not linear.quantized and not linear.transposed:
        return linear.weight.dtype
    constants = [None if value is None else value.const_value for value in node.inputs[1:]]
    tensors = [tensor for tensor in constants if tensor is not None]
    if node.op_type != MATMUL_NBITS or len(constants) > _PACKED_CONSTANTS:
        return None
    if len(tensors) < len(constants):
        return None
    own = {name: str(value) for name, value in attributes_of(node).items() if name != _OUTPUTS}
    return node.domain, *sorted(own.items()), *((t.dtype, len(t.shape)) for t in tensors)


def _product(graph: ir.Graph, members: list[Linear]) -> Fused:
    """The product of `members`, which is fused if there are several."""
    label = label_of([member.module for member in members])
    if members[0].slice is not None:
        _check_complete(label, members)
        return Fused(label, tuple(members), _split_outputs(label, members))
    return Fused(label, tuple(members)) if len(members) == 1 else _fuse(graph, label, members)


def _split_outputs(label: str, members: Sequence[Linear]) -> tuple[ir.Value, ...] | None:
    """The members' outputs if an earlier export fused the product, as in a merged graph."""
    users = [use.node for use in output_of(members[0].nodes[0]).uses()]
    if [node.name for node in users] != [step_name(label, FUSED_SPLIT)]:
        return None
    return tuple(users[0].outputs) if len(users[0].outputs) == len(members) else None


def _check_complete(label: str, members: Sequence[Linear]) -> None:
    """Raise ExportError unless `members` are all modules of the fused product."""
    slices = [member.slice or (0, 0) for member in members]
    begins, ends = [begin for begin, _ in slices], [end for _, end in slices]
    shape = output_of(members[0].nodes[0]).shape
    outputs = ends[-1] if shape is None or not isinstance(shape[-1], int) else shape[-1]
    if [*begins, outputs] == [0, *ends]:
        return
    raise ExportError(
        f"{label} is part of a fused product whose other parts take no adapters: merge the"
        " adapter instead"
    )


def _fuse(graph: ir.Graph, label: str, members: Sequence[Linear]) -> Fused:
    import onnx_ir as ir

    nodes = [member.nodes[0] for member in members]
    # The fused product goes before the first of them in the graph.
    first = next(node for node in graph if node in nodes)
    x, y = first.inputs[0], first.outputs[0]
    assert x is not None
    sizes = [member.out_features for member in members]
    constants = [add_tensor(graph, tensor) for tensor in _joined(weight_name(label), nodes)]
    product = _product_node(first, label, [x, *constants], sum(sizes))
    out = product.outputs[0]
    out.type = y.type
    if y.shape is not None:
        out.shape = ir.Shape([*list(y.shape)[:-1], sum(sizes)])
    split = ir.node(
        "Split",
        [out, add_constant(graph, f"{label}.sizes", np.array(sizes, np.int64))],
        attributes={"axis": -1},
        num_outputs=len(members),
        name=step_name(label, FUSED_SPLIT),
    )
    graph.insert_before(first, [product, split])
    fused, begin = [], 0
    for member, part in zip(members, split.outputs, strict=True):
        node, end = member.nodes[0], begin + member.out_features
        part.name = output_name(member.module)
        replace_uses(node.outputs[0], part)
        own = [str(value.name) for value in node.inputs[1:] if value is not None]
        graph.remove(node, safe=True)
        for name in own:
            graph.initializers.pop(name)
        fused.append(
            dataclasses.replace(member, nodes=(product,), weight=constants[0], slice=(begin, end))
        )
        begin = end
    return Fused(label, tuple(fused), tuple(split.outputs))


def _joined(name: str, nodes: Sequence[ir.Node]) -> list[ir.TensorProtocol]:
    """The constants of the products `nodes` side by side, in the order of their inputs."""
    axis = 1 if nodes[0].op_type == "MatMul" else 0
    found = []
    for index, own in enumerate(_names_of_constants(name, nodes[0]), start=1):
        values = [value for node in nodes if (value := node.inputs[index]) is not None]
        parts = [tensor for value in values if (tensor := value.const_value) is not None]
        found.append(joined(own, parts, axis=axis))
    return found


def _names_of_constants(name: str, product: ir.Node) -> list[str]:
    """The names of a product's constants; `name`: the name of its weight in floats."""
    if product.op_type == "MatMul":
        return [name]
    return packed_names(name, packed_bits(product))[: len(product.inputs) - 1]


def _product_node(
    like: ir.Node, label: str, inputs: Sequence[ir.Value | None], outputs: int
) -> ir.Node:
    """A product of the kind of `like`, with other inputs and another number of outputs."""
    import onnx_ir as ir

    own = [value for name, value in like.attributes.items() if name != _OUTPUTS]
    if _OUTPUTS in like.attributes:
        own.append(ir.AttrInt64(_OUTPUTS, outputs))
    node = ir.Node(
        like.domain,
        like.op_type,
        inputs,
        attributes=own,
        name=f"{label}/MatMul",
        metadata_props=linear_scopes(label),
    )
    node.outputs[0].name = node.name
    return node


def _separate(
    graph: ir.Graph, label: str, members: Sequence[LoraTarget], split: ir.Node | None
) -> list[ir.Value]:
    whole = None if split is None else split.inputs[0]
    product = None if whole is None else whole.producer()
    if split is None or product is None or len(split.outputs) != len(members):
        raise ExportError(f"the graph has no fused product at {label}: it was changed")
    total, end = sum(member.out_features for member in members), 0
    for member, old in zip(members, split.outputs, strict=True):
        begin, end = end, end + member.out_features
        inputs: list[ir.Value | None] = [product.inputs[0]]
        names = _names_of_constants(weight_name(member.module), product)
        for name, value in zip(names, product.inputs[1:], strict=True):
            if value is None:
                inputs.append(None)
                continue
            own = _outputs(constant_of(value), begin, end, total, product.op_type)
            inputs.append(add_constant(graph, name, own))
        node = _product_node(product, member.module, inputs, member.out_features)
        graph.insert_before(product, node)
        replace_uses(old, node.outputs[0])
    return [value for value in product.inputs[1:] if value is not None]


def _outputs(
    numbers: NDArray[np.generic], begin: int, end: int, outputs: int, op_type: str
) -> NDArray[np.generic]:
    """The part of a product's constant for its outputs from `begin` to `end`."""
    if op_type == "MatMul":
        return numbers[:, begin:end]
    # MatMulNBits orders its constants by output; in older versions its scales are flat.
    return numbers.reshape(outputs, -1)[begin:end].reshape(-1, *numbers.shape[1:])
