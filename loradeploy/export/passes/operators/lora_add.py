"""Make each low-rank update one call.

    y + (x A[adapter_ids]) B[adapter_ids]  →  LoraAdd(y, x, A, B, adapter_ids, adapter_ranks)

The kernel also reads `adapter_ranks` [slots, targets]: A and B of slot s are zeros beyond the rank
[s, target]. The attribute `target` is the index of the module in the manifest's targets. If
`adapter_ranks` is not fed, every adapter has the whole rank.

Updates of other forms keep their nodes: those in the layout rows or in float16, of embeddings and
experts, of inputs that are not [batch, sequence, in], and of modules that came fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.names import (
    ADAPTER_IDS,
    ADAPTER_RANKS,
    LORA_ADD_OPERATOR,
    OPERATOR_DOMAIN,
)
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import (
    add_optional_input,
    input_at,
    only_user,
    remove_optional_input,
    remove_unused,
    replace_node,
    replace_uses,
)
from loradeploy.export.graph.file import opset_of
from loradeploy.export.graph.names import (
    LORA_A_GATHER,
    LORA_A_MATMUL,
    LORA_ADD,
    LORA_B_GATHER,
    LORA_B_MATMUL,
    is_step,
)
from loradeploy.export.passes.operators.function import add_function, function_of, is_call
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.bundle.manifest import Manifest

logger = logger_of(__name__)

TARGET: Final = "target"
_AXES: Final = 3  # of x and y


@dataclass(frozen=True, eq=False)
class _Update:
    """The nodes of one update: `add` computes y + (x A) B."""

    add: ir.Node
    y: ir.Value
    x: ir.Value
    A: ir.Value
    B: ir.Value


def use_lora_add(model: ir.Model, manifest: Manifest) -> None:
    """Replace the updates by calls, and add the function and the input `adapter_ranks`.

    Raises:
        ExportError: a value of the graph is named `adapter_ranks` already.
    """
    import onnx_ir as ir

    graph = model.graph
    index = {target.lora_A: at for at, target in enumerate(manifest.targets)}
    updates = [each for each in _updates(graph) if each.A.name in index]
    if not updates:
        return
    if left := len(index) - len({update.A for update in updates}):
        logger.info("%d of %d layers keep standard operators", left, len(index))
    none = np.zeros((0, len(index)), np.int64)
    ranks = add_optional_input(graph, ADAPTER_RANKS, none, ["ranked", len(index)])
    ids = graph.initializers[ADAPTER_IDS]
    for update in updates:
        call = ir.node(
            LORA_ADD_OPERATOR,
            [update.y, update.x, update.A, update.B, ids, ranks],
            attributes={TARGET: index[str(update.A.name)]},
            domain=OPERATOR_DOMAIN,
            name=update.add.name,
        )
        call.metadata_props.update(update.add.metadata_props)
        replace_node(update.add, [call])
    remove_unused(graph)
    add_function(model, _function(opset_of(model)))


def remove_lora_add(model: ir.Model) -> None:
    """Undo `use_lora_add`, except for the function.

    Raises:
        ExportError: a call lacks an input.
    """
    graph = model.graph
    for call in [node for node in graph.all_nodes() if is_call(node, LORA_ADD_OPERATOR)]:
        y, x, A, B, ids, _ = (_given(value) for value in call.inputs)
        label = str(call.name).removesuffix(LORA_ADD)
        assert A.dtype is not None  # it is an input of the graph
        nodes = update_nodes(y, x, A, B, ids)
        for node in nodes:
            node.name = node.outputs[0].name = f"{label}{node.name}"
            node.outputs[0].dtype = A.dtype
        total = nodes[-1]
        total.metadata_props.update(call.metadata_props)
        body = call.graph
        assert body is not None
        body.insert_after(call, nodes)
        replace_uses(call.outputs[0], total.outputs[0])
        body.remove(call, safe=True)
    remove_optional_input(graph, ADAPTER_RANKS)


def _updates(graph: ir.Graph) -> Iterator[_Update]:
    """The updates that a call can compute, in branches too."""
    import onnx_ir as ir

    ids = graph.initializers.get(ADAPTER_IDS)
    for add in graph.all_nodes():
        if not is_step(add, LORA_ADD) or ids is None:
            continue
        y, update = add.inputs[0], input_at(add, 1)
        up = _only_step(update, LORA_B_MATMUL)
        down = None if up is None else _only_step(up.inputs[0], LORA_A_MATMUL)
        if y is None or up is None or down is None:
            continue
        x, A, B = down.inputs[0], _slots(down.inputs[1], ids), _slots(up.inputs[1], ids)
        if x is None or A is None or B is None or A.dtype != ir.DataType.FLOAT:
            continue
        if _has_rows(graph, x, y):
            yield _Update(add, y, x, A, B)


def _only_step(value: ir.Value | None, step: str) -> ir.Node | None:
    """The node of `step` that computes `value`, if nothing else uses it."""
    node = None if value is None else value.producer()
    if node is None or value is None or not is_step(node, step) or only_user(value) is None:
        return None
    return node


def _slots(value: ir.Value | None, ids: ir.Value) -> ir.Value | None:
    """The side input whose slots `value` gathers by `ids`."""
    node = None if value is None else value.producer()
    gathers = node is not None and node.op_type == "Gather" and node.inputs[1] is ids
    return node.inputs[0] if node is not None and gathers else None


def _has_rows(graph: ir.Graph, x: ir.Value, y: ir.Value) -> bool:
    """Whether x and y are [batch, sequence, …], rather than one row that serves all.

    y, the product of x, may have no known shape: a traced layer with a bias has none before it.
    """
    batch = next((v.shape[0] for v in graph.inputs if not v.is_initializer() and v.shape), None)
    return x.shape is not None and all(
        len(shape) == _AXES and (shape[0] != 1 or batch == 1)
        for shape in (x.shape, y.shape)
        if shape is not None
    )


def _given(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise ExportError("a call of the operator in the graph lacks an input: it was changed")
    return value


def update_nodes(
    y: ir.Value, x: ir.Value, A: ir.Value, B: ir.Value, ids: ir.Value
) -> list[ir.Node]:
    """The nodes that a call stands for, each named after its step; the last computes the result."""
    import onnx_ir as ir

    a = ir.node("Gather", [A, ids], attributes={"axis": 0}, name=LORA_A_GATHER)
    b = ir.node("Gather", [B, ids], attributes={"axis": 0}, name=LORA_B_GATHER)
    low = ir.node("MatMul", [x, a.outputs[0]], name=LORA_A_MATMUL)
    update = ir.node("MatMul", [low.outputs[0], b.outputs[0]], name=LORA_B_MATMUL)
    total = ir.node("Add", [y, update.outputs[0]], name=LORA_ADD)
    return [a, b, low, update, total]


def _function(opset: int) -> ir.Function:
    """The function with the nodes that a call stands for."""
    import onnx_ir as ir

    inputs = [ir.Value(name=name) for name in ("y", "x", "A", "B", ADAPTER_IDS, ADAPTER_RANKS)]
    nodes = update_nodes(*inputs[:-1])
    attributes = {TARGET: ir.AttributeType.INT}
    return function_of(LORA_ADD_OPERATOR, inputs, nodes, nodes[-1].outputs, {"": opset}, attributes)
