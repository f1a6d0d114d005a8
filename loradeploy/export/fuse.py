"""Products of the same input made one: q, k and v; gate and up.

    x W_q, x W_k, x W_v   →   Split(x [W_q W_k W_v])

A decoder at batch 1 spends much of its time between products, so that fewer and larger ones are
faster, with side inputs or without: one pair of factors serves all members (see `bundle.pairs`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.manifest import LoraTarget
from loradeploy.bundle.names import lora_a_name, lora_b_name
from loradeploy.bundle.pairs import FactorPair, outputs_of
from loradeploy.errors import ExportError
from loradeploy.export.find import Linear
from loradeploy.export.rewire import add_constant, constant_of, take_over
from loradeploy.export.tidy import linear_scopes

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_JOINT: Final = "+"


@dataclass(frozen=True, eq=False)
class Fused:
    """One product: `linear`, and the `members` whose outputs it gives, in their order.

    A linear that shares its input with no other is a product of its own, and its only member. Some
    graphs come with packed products; those stay as they are.
    """

    linear: Linear
    members: tuple[Linear, ...]

    def targets(self) -> tuple[LoraTarget, ...]:
        """The members as a manifest tells of them."""
        if self.linear.module == self.members[0].module:
            return (self.linear.target(),)
        begin, targets = 0, []
        for member in self.members:
            end = begin + member.out_features
            targets.append(
                dataclasses.replace(
                    member.target(),
                    lora_A=lora_a_name(self.linear.module),
                    lora_B=lora_b_name(self.linear.module),
                    weight=str(self.linear.weight.name),
                    transposed=self.linear.transposed,
                    slice=(begin, end),
                )
            )
            begin = end
        return tuple(targets)


def fuse_products(
    graph: ir.Graph, linears: Iterable[Linear], *, apart: Collection[str] = ()
) -> list[Fused]:
    """Make one product of those linears of one module that take the same input.

    Modules in `apart` stay as they are, and so does a linear that is called twice, whose weight
    something else uses, or is packed or turned. The order of the linears is kept.
    """
    groups: dict[object, list[Linear]] = {}
    for linear in linears:
        key = _key(linear) if linear.module not in apart else None
        groups.setdefault(linear if key is None else key, []).append(linear)
    return [Fused(_whole(graph, members), tuple(members)) for members in groups.values()]


def is_packed(pair: FactorPair) -> bool:
    """Whether the pair's product came with the graph: what is fused here is called after it."""
    return len(pair.members) > 1 and not pair.members[0].weight.startswith(f"{pair.label}.weight")


def separate_products(graph: ir.Graph, pairs: Iterable[FactorPair]) -> None:
    """Undo `fuse_products`, once the graph's side inputs are out.

    Raises:
        ExportError: the graph does not have the products that the pairs tell of.
    """
    nodes = {str(node.name): node for node in graph}
    for pair in pairs:
        if len(pair.members) > 1 and not is_packed(pair):
            _separate(graph, pair, nodes.get(f"{pair.label}/split"))


def called_after(product: str) -> list[str]:
    """The modules that a product of several is called after; itself where it is of one."""
    parent, dot, names = product.rpartition(".")
    return [f"{parent}{dot}{name}" for name in names.split(_JOINT)]


def _key(linear: Linear) -> object:
    """What linears that can be fused have in common; None where this one cannot."""
    if linear.slice is not None:
        return linear.nodes
    (node, *more) = linear.nodes
    x, weight = node.inputs[0], linear.weight
    if more or linear.quantised or linear.transposed or node.op_type != "MatMul":
        return None
    if node.inputs[1] is not weight or len(list(weight.uses())) > 1 or x is None:
        return None
    return x, linear.module.rpartition(".")[0], constant_of(weight).dtype


def _whole(graph: ir.Graph, members: Sequence[Linear]) -> Linear:
    """The product of all members."""
    first = members[0]
    if first.slice is not None:
        reached = max(0 if member.slice is None else member.slice[1] for member in members)
        return dataclasses.replace(
            first, module=_label(members), out_features=reached, slice=None, bias=None
        )
    return first if len(members) == 1 else _fuse(graph, members)


def _label(members: Sequence[Linear]) -> str:
    """What a product of several modules is called: after all of them, their parent's path once."""
    parent = members[0].module.rpartition(".")[0]
    names = _JOINT.join(member.module.removeprefix(f"{parent}.") for member in members)
    return f"{parent}.{names}" if parent else names


def _fuse(graph: ir.Graph, members: Sequence[Linear]) -> Linear:
    import onnx_ir as ir

    label = _label(members)
    weight = np.concatenate([constant_of(member.weight) for member in members], axis=1)
    nodes = [member.nodes[0] for member in members]
    # The input is there before any of them; which comes first, only the graph tells.
    first = next(node for node in graph if node in nodes)
    x, y = first.inputs[0], first.outputs[0]
    assert x is not None
    constant = add_constant(graph, f"{label}.weight", weight)
    product = ir.node(
        "MatMul",
        [x, constant],
        name=f"{label}/MatMul",
        metadata_props=linear_scopes(label),
    )
    out = product.outputs[0]
    out.name, out.type = product.name, y.type
    if y.shape is not None:
        out.shape = ir.Shape([*list(y.shape)[:-1], weight.shape[1]])
    sizes = np.array([member.out_features for member in members], np.int64)
    split = ir.node(
        "Split",
        [out, add_constant(graph, f"{label}.sizes", sizes)],
        attributes={"axis": -1},
        num_outputs=len(members),
        name=f"{label}/split",
    )
    graph.insert_before(first, [product, split])
    for member, part in zip(members, split.outputs, strict=True):
        old = member.nodes[0].outputs[0]
        part.name = f"{member.module}/output"
        take_over(graph, old, part, keep=None)
        graph.remove(member.nodes[0], safe=True)
        graph.initializers.pop(str(member.weight.name))
    return dataclasses.replace(
        members[0],
        module=label,
        nodes=(product,),
        weight=constant,
        out_features=weight.shape[1],
        bias=None,
    )


def _separate(graph: ir.Graph, pair: FactorPair, split: ir.Node | None) -> None:
    import onnx_ir as ir

    whole = None if split is None else split.inputs[0]
    product = None if whole is None else whole.producer()
    if split is None or product is None or len(split.outputs) != len(pair.members):
        raise ExportError(f"the graph has no fused product at {pair.label}: it was changed")
    for member, old in zip(pair.members, split.outputs, strict=True):
        begin, end = outputs_of(member)
        inputs: list[ir.Value | None] = [product.inputs[0]]
        for index, value in enumerate(product.inputs[1:], start=1):
            if value is None:
                inputs.append(None)
                continue
            own = _outputs(constant_of(value), begin, end, pair.out_features, product.op_type)
            part = "weight" if index == 1 else f"weight.{index}"
            inputs.append(add_constant(graph, f"{member.module}.{part}", own))
        attributes = {name: value for name, value in product.attributes.items() if name != "N"}
        if "N" in product.attributes:
            attributes["N"] = ir.AttrInt64("N", member.out_features)
        node = ir.Node(
            product.domain,
            product.op_type,
            inputs,
            attributes=list(attributes.values()),
            name=f"{member.module}/MatMul",
            metadata_props=linear_scopes(member.module),
        )
        node.outputs[0].name = node.name
        graph.insert_before(product, node)
        take_over(graph, old, node.outputs[0], keep=None)


def _outputs(
    numbers: NDArray[np.generic], begin: int, end: int, outputs: int, op_type: str
) -> NDArray[np.generic]:
    """The part of a product's constant that makes its outputs from `begin` to `end`."""
    if op_type == "MatMul":
        return numbers[:, begin:end]
    # MatMulNBits has everything in the order of the outputs, its scales flat in older versions.
    return numbers.reshape(outputs, -1)[begin:end].reshape(-1, *numbers.shape[1:])
