"""One graph, two branches over the same weights: the base, and the base with an adapter.

    If adapter_mode = 0   base      the graph without side inputs
                    = 1   adapted   the graph with side inputs, in its layout

Hundreds of small nodes cost an idle graph 2 to 18 % of a decode step, and gathering factors costs
an active one as much again; an `If` has no measurable cost. The branches share the initializers.
ONNX Runtime shares packed weights of 8 and 4 bits between them too, but packs float weights again
for each branch. In a branch inside a branch it does neither, and a step takes 20 times as long, so
that branches are never nested. A CUDA graph cannot capture an `If`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.names import ADAPTER_MODE, BASE
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import (
    add_optional_input,
    remove_all,
    remove_optional_input,
)
from loradeploy.export.graph.names import BRANCHES, LORA_ADD, is_step
from loradeploy.export.match.products import products
from loradeploy.export.passes.forms.layout import gathered_slots

if TYPE_CHECKING:
    import onnx_ir as ir

_ADAPTED: Final = "adapted"
_SCALES: Final = 2  # the index of the scales of a MatMulNBits


def branches_problem(graph: ir.Graph) -> str | None:
    """Why ONNX Runtime (1.31) would not run the graph with branches; None if it would.

    On the CPU it computes wrong results with packed weights that two branches share, if the rest is
    in fp16. It fuses a DequantizeLinear and the product after it into a MatMulNBits, and in a
    branch it does not find the shared weight for it. If the other factor is dequantized too, it
    makes another fusion, which works. On x86 processors without VNNI, products with signed 8-bit
    weights are only exact after a rewrite (`EXACT_INTEGERS`) that skips shared weights.
    """
    import onnx_ir as ir

    attributes = (attribute for node in graph for attribute in node.attributes.values())
    if any(attribute.type == ir.AttributeType.GRAPH for attribute in attributes):
        return "the graph has branches or loops of its own: export with `branches=False`"
    for node in graph:
        scales = node.inputs[_SCALES] if node.op_type == "MatMulNBits" else None
        if scales is not None and scales.dtype == ir.DataType.FLOAT16:
            return (
                f"onnxruntime computes packed weights in fp16 ({node.name}) wrong in branches:"
                " export with `branches=False`"
            )
        if any(_is_signed_matrix(value) for value in node.inputs):
            return (
                "onnxruntime computes signed 8-bit weights wrong in branches on processors without"
                f" VNNI ({node.name}): export with `branches=False`"
            )
    for product in products(graph):
        x = product.node.inputs[0]
        before = None if x is None else x.producer()
        if product.scaled is not None and (before is None or before.op_type != "DequantizeLinear"):
            return (
                f"onnxruntime does not open branches over a DequantizeLinear ({product.node.name}):"
                " export with `branches=False`"
            )
    return None


def _is_signed_matrix(value: ir.Value | None) -> bool:
    """Whether the value is a weight of signed 8-bit integers, as factors and kernels have."""
    import onnx_ir as ir

    if value is None or value.const_value is None or value.dtype != ir.DataType.INT8:
        return False
    return len(value.const_value.shape) > 1


def add_branches(graph: ir.Graph) -> None:
    """Split a graph with side inputs into its two branches.

    Raises:
        ExportError: the graph already has branches or loops, or weights that cannot be shared.
    """
    import onnx_ir as ir

    if (problem := branches_problem(graph)) is not None:
        raise ExportError(problem)
    nodes, outputs = list(graph), list(graph.outputs)
    # The base branch has one slot, whose side inputs are the base's own values: nothing to gather.
    base = _copy(nodes, outputs, BASE, {**gathered_slots(graph), **_without_factors(nodes)})
    other = _copy(nodes, outputs, _ADAPTED, {})
    types = [(value.name, value.type, value.shape) for value in outputs]
    graph.outputs.clear()
    graph.remove(nodes, safe=True)
    mode = add_optional_input(graph, ADAPTER_MODE, np.zeros(1, np.int64), [1])
    to_bool = {"to": int(ir.DataType.BOOL)}
    active = ir.node("Cast", [mode], attributes=to_bool, name=f"{BRANCHES}/active")
    active.outputs[0].name = active.name
    branches = [ir.AttrGraph("then_branch", other), ir.AttrGraph("else_branch", base)]
    choice = ir.Node(
        "", "If", [active.outputs[0]], branches, num_outputs=len(outputs), name=BRANCHES
    )
    graph.extend([active, choice])
    _name_outputs(graph, choice.outputs, types)


def remove_branches(graph: ir.Graph) -> None:
    """Undo `add_branches`: the adapted branch becomes the graph again.

    Raises:
        ExportError: the graph does not have the branches.
    """
    choice = next((node for node in graph if node.name == BRANCHES), None)
    if choice is None:
        raise ExportError("the graph lacks the branches that its manifest lists: it was changed")
    body = choice.attributes["then_branch"].as_graph()
    nodes, values = list(body), list(body.outputs)
    body.outputs.clear()
    body.remove(nodes)
    types = [(value.name, value.type, value.shape) for value in graph.outputs]
    graph.outputs.clear()
    remove_all(graph)
    prefix = f"{body.name}/"
    for node in nodes:
        node.name = str(node.name).removeprefix(prefix)
        for value in node.outputs:
            value.name = str(value.name).removeprefix(prefix)
    graph.extend(nodes)
    _name_outputs(graph, values, types)
    remove_optional_input(graph, ADAPTER_MODE)


def _name_outputs(
    graph: ir.Graph,
    values: Sequence[ir.Value],
    types: Sequence[tuple[str | None, ir.TypeProtocol | None, ir.Shape | None]],
) -> None:
    for value, (name, kind, shape) in zip(values, types, strict=True):
        value.name, value.type, value.shape = name, kind, shape
        graph.outputs.append(value)


def _without_factors(nodes: Sequence[ir.Node]) -> dict[ir.Value, ir.Value]:
    """For each sum of a product and its low-rank update, the product."""
    sums = (node for node in nodes if is_step(node, LORA_ADD))
    return {node.outputs[0]: base for node in sums if (base := node.inputs[0]) is not None}


def _copy(
    nodes: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    name: str,
    instead: Mapping[ir.Value, ir.Value],
) -> ir.Graph:
    """A branch that computes `outputs`, with each key of `instead` replaced by its value."""
    import onnx_ir as ir

    def seen(value: ir.Value) -> ir.Value:
        while value in instead:
            value = instead[value]
        return value

    copied: dict[ir.Value, ir.Value] = {}
    made = []
    for node in _needed(nodes, outputs, seen):
        inputs = [None if v is None else copied.get(seen(v), seen(v)) for v in node.inputs]
        new = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            attributes=list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=f"{name}/{node.name}",
            metadata_props=dict(node.metadata_props),
        )
        for old, own in zip(node.outputs, new.outputs, strict=True):
            own.name = f"{name}/{old.name}" if old.name else ""
            own.type, own.shape = old.type, old.shape
            copied[old] = own
        made.append(new)
    return ir.Graph([], [copied[seen(value)] for value in outputs], nodes=made, name=name)


def _needed(
    nodes: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    seen: Callable[[ir.Value], ir.Value],
) -> list[ir.Node]:
    """The nodes that compute `outputs`, in order."""
    needed = {seen(value) for value in outputs}
    kept = []
    for node in reversed(nodes):
        if any(value in needed for value in node.outputs):
            kept.append(node)
            needed.update(seen(value) for value in node.inputs if value is not None)
    return kept[::-1]
