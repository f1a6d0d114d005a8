"""Make each low-rank update one call of a function, which the operator's library can replace.

    y + (x A[adapter_ids]) B[adapter_ids]  →  LoraAdd(y, x, A, B, adapter_ids, adapter_ranks)

The function is part of the model, and its body are the nodes that it replaces: onnxruntime inlines
it. If a session registers the library, onnxruntime runs its kernel instead, which also reads
`adapter_ranks` [slots, targets]: A and B of slot s are zeros beyond the rank [s, target]. The
attribute `target` is the index of the module in the manifest's targets. If `adapter_ranks` is not
fed, every adapter has the whole rank.

Updates of other forms keep their nodes: those of embeddings and experts, of inputs that are not
[batch, sequence, in], and of modules that came fused. This is the last pass, so that no other pass
meets a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.names import ADAPTER_IDS, ADAPTER_RANKS, OPERATOR_DOMAIN, OPERATOR_NAME
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import (
    Chain,
    add_constant,
    input_at,
    only_user,
    remove_unused,
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
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.bundle.manifest import Manifest

logger = logger_of(__name__)

_OPERATOR: Final = (OPERATOR_DOMAIN, OPERATOR_NAME)
_TARGET: Final = "target"
_VERSION: Final = 1  # of the domain
_IR_VERSION: Final = 8  # the first with functions
_AXES: Final = 3  # of x and y


@dataclass(frozen=True, eq=False)
class _Update:
    """The nodes of one update: `add` computes y + (x A) B."""

    add: ir.Node
    y: ir.Value
    x: ir.Value
    A: ir.Value
    B: ir.Value


def use_operator(model: ir.Model, manifest: Manifest) -> None:
    """Replace the updates by calls, and add the input `adapter_ranks`.

    Raises:
        ExportError: the graph has no update that a call can compute.
    """
    import onnx_ir as ir

    graph = model.graph
    index = {target.lora_A: at for at, target in enumerate(manifest.targets)}
    updates = [each for each in _updates(graph) if each.A.name in index]
    if not updates:
        raise ExportError(
            "no low-rank update of the graph can be a call of the operator: export without"
            " `operator`"
        )
    if left := len(index) - len({update.A for update in updates}):
        logger.info("%d of %d layers keep standard operators", left, len(index))
    if ADAPTER_RANKS in graph.initializers or any(v.name == ADAPTER_RANKS for v in graph.inputs):
        raise ExportError(f"the graph already has a value named {ADAPTER_RANKS}")
    none = np.zeros((0, len(index)), np.int64)
    ranks = add_constant(graph, ADAPTER_RANKS, none, shape=["ranked", len(index)])
    graph.inputs.append(ranks)
    ids = graph.initializers[ADAPTER_IDS]
    for update in updates:
        call = ir.node(
            OPERATOR_NAME,
            [update.y, update.x, update.A, update.B, ids, ranks],
            attributes={_TARGET: index[str(update.A.name)]},
            domain=OPERATOR_DOMAIN,
            name=update.add.name,
        )
        call.metadata_props.update(update.add.metadata_props)
        _put_instead(graph, update.add, call, call.outputs[0])
    remove_unused(graph)
    function = _function(opset_of(model))
    model.functions[function.identifier()] = function
    graph.opset_imports[OPERATOR_DOMAIN] = _VERSION
    model.ir_version = max(model.ir_version, _IR_VERSION)


def remove_operator(model: ir.Model) -> None:
    """Undo `use_operator`: every call becomes standard operators again.

    Raises:
        ExportError: the graph has no calls.
    """
    graph = model.graph
    calls = [node for node in graph if (node.domain, node.op_type) == _OPERATOR]
    if not calls:
        raise ExportError("the graph lacks the calls that its manifest lists: it was changed")
    for call in calls:
        y, x, A, B, ids, _ = (_given(value) for value in call.inputs)
        label = str(call.name).removesuffix(f"/{LORA_ADD}")
        assert A.dtype is not None  # it is an input of the graph
        chain = Chain(graph, call, label, A.dtype)
        a = chain.add("Gather", LORA_A_GATHER, [A, ids], axis=0)
        b = chain.add("Gather", LORA_B_GATHER, [B, ids], axis=0)
        low = chain.add("MatMul", LORA_A_MATMUL, [x, a])
        update = chain.add("MatMul", LORA_B_MATMUL, [low, b])
        total = chain.add("Add", LORA_ADD, [y, update])
        chain.last.metadata_props.update(call.metadata_props)
        replace_uses(call.outputs[0], total)
        graph.remove(call, safe=True)
    ranks = graph.initializers.pop(ADAPTER_RANKS)
    graph.inputs.remove(ranks)
    for identifier in [name for name in model.functions if name[:2] == _OPERATOR]:
        del model.functions[identifier]
    graph.opset_imports.pop(OPERATOR_DOMAIN, None)


def _updates(graph: ir.Graph) -> Iterator[_Update]:
    """The updates that a call can compute."""
    ids = graph.initializers.get(ADAPTER_IDS)
    for add in graph:
        if not is_step(add, LORA_ADD) or ids is None:
            continue
        y, update = add.inputs[0], input_at(add, 1)
        up = _only_step(update, LORA_B_MATMUL)
        down = None if up is None else _only_step(up.inputs[0], LORA_A_MATMUL)
        if y is None or up is None or down is None:
            continue
        x, A, B = down.inputs[0], _slots(down.inputs[1], ids), _slots(up.inputs[1], ids)
        if x is not None and A is not None and B is not None and _has_rows(graph, x, y):
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


def _put_instead(graph: ir.Graph, old: ir.Node, new: ir.Node, value: ir.Value) -> None:
    """Put `new` in the place of `old`; `value` takes the name of the result of `old`."""
    result = old.outputs[0]
    name = result.name
    graph.insert_after(old, new)
    replace_uses(result, value)
    graph.remove(old, safe=True)
    value.name = name


def _given(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise ExportError("a call of the operator in the graph lacks an input: it was changed")
    return value


def _function(opset: int) -> ir.Function:
    """The function with the nodes that a call replaces."""
    import onnx_ir as ir

    inputs = [ir.Value(name=name) for name in ("y", "x", "A", "B", ADAPTER_IDS, ADAPTER_RANKS)]
    y, x, A, B, ids, _ = inputs
    a = ir.node("Gather", [A, ids], attributes={"axis": 0})
    b = ir.node("Gather", [B, ids], attributes={"axis": 0})
    down = ir.node("MatMul", [x, a.outputs[0]])
    up = ir.node("MatMul", [down.outputs[0], b.outputs[0]])
    total = ir.node("Add", [y, up.outputs[0]])
    nodes = [a, b, down, up, total]
    for node, name in zip(nodes, ("a", "b", "low", "update", "result"), strict=True):
        node.outputs[0].name = name
    graph = ir.Graph(
        inputs, total.outputs, nodes=nodes, opset_imports={"": opset}, name=OPERATOR_NAME
    )
    attribute = ir.Attr(_TARGET, ir.AttributeType.INT, None)
    return ir.Function(OPERATOR_DOMAIN, OPERATOR_NAME, graph=graph, attributes=[attribute])
