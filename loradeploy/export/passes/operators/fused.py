"""Make the updates of all layers of a fused product one call.

    Split(y), LoraAdd of each part             →  LoraAdd2 or LoraAdd3(y, x, A, B, A, B, …)
    the same of gate and up, then SiluMul      →  LoraSwiGLU(y, x, A, B, A, B, …)

The kernels read x and y once: a Split writes a copy of y, and each LoraAdd reads x again. The last
inputs are `adapter_ids` and `adapter_ranks`, as of LoraAdd. The attributes have a value for each
layer: `targets`, its index in the manifest's targets, and `sizes`, the size of its part of y.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from loradeploy.bundle.names import (
    ADAPTER_IDS,
    ADAPTER_RANKS,
    LORA_ADD_2_OPERATOR,
    LORA_ADD_3_OPERATOR,
    LORA_ADD_OPERATOR,
    LORA_SWIGLU_OPERATOR,
    OPERATOR_DOMAIN,
    SILU_MUL_OPERATOR,
)
from loradeploy.export.graph.edit import only_user, remove_unused, replace_uses
from loradeploy.export.graph.file import opset_of
from loradeploy.export.graph.names import FUSED_SPLIT, LORA_ADD, is_step, step_name
from loradeploy.export.passes.operators.function import (
    add_function,
    changed_call,
    function_of,
    is_call,
)
from loradeploy.export.passes.operators.gated import gated_nodes
from loradeploy.export.passes.operators.lora_add import TARGET, update_nodes
from loradeploy.export.passes.operators.split import (
    label_of_product,
    modules_of,
    sizes_of,
    split_again,
)

if TYPE_CHECKING:
    import onnx_ir as ir

_TARGETS: Final = "targets"
_SIZES: Final = "sizes"
_VALUE_INTS: Final = "value_ints"  # of Constant, from opset 12
_SPLIT_SIZES: Final = 13  # the first opset whose Split has its sizes as an input
# The number of layers of each operator.
_LAYERS: Final = MappingProxyType(
    {LORA_ADD_2_OPERATOR: 2, LORA_ADD_3_OPERATOR: 3, LORA_SWIGLU_OPERATOR: 2}
)
_ADDS: Final = MappingProxyType({2: LORA_ADD_2_OPERATOR, 3: LORA_ADD_3_OPERATOR})


@dataclass(frozen=True, eq=False)
class _Fused:
    """A Split whose parts have nothing but updates; `gated`: the SiluMul of the two, if any."""

    split: ir.Node
    sizes: list[int]
    updates: list[ir.Node]
    gated: ir.Node | None


def use_fused(model: ir.Model) -> None:
    """Replace calls of LoraAdd and SiluMul after a Split, and add the functions."""
    graph, opset = model.graph, opset_of(model)
    if opset < _SPLIT_SIZES:
        return
    places = {node: place for place, node in enumerate(graph.all_nodes())}
    names = set()
    for found in list(_fused(graph)):
        name = _ADDS[len(found.sizes)] if found.gated is None else LORA_SWIGLU_OPERATOR
        _replace(found, name, min(found.updates, key=places.__getitem__))
        names.add(name)
    for name in sorted(names):
        add_function(model, _function(name, opset))
    remove_unused(graph)


def remove_fused(model: ir.Model) -> None:
    """Undo `use_fused`, except for the functions.

    Raises:
        ExportError: a call was changed.
    """
    for call in list(model.graph.all_nodes()):
        if is_call(call, *_LAYERS):
            _separate(model.graph, call)


def _fused(graph: ir.Graph) -> Iterator[_Fused]:
    """The parts that a call can compute, in branches too."""
    for split in graph.all_nodes():
        if not is_step(split, FUSED_SPLIT) or len(split.outputs) not in _ADDS:
            continue
        sizes, updates = sizes_of(split), [_update(value) for value in split.outputs]
        if sizes is not None and _fit_together(split, updates):
            given = [update for update in updates if update is not None]
            yield _Fused(split, sizes, given, _gated(given))


def _update(part: ir.Value) -> ir.Node | None:
    """The LoraAdd that alone uses a part."""
    node = only_user(part)
    return node if is_call(node, LORA_ADD_OPERATOR) and node.inputs[0] is part else None


def _fit_together(split: ir.Node, updates: list[ir.Node | None]) -> bool:
    """Whether the updates are of all parts, of one x, and have names that can be made again."""
    y, first = split.inputs[0], updates[0]
    if y is None or first is None:
        return False
    names = [step_name(module, LORA_ADD) for module in modules_of(y)]
    return all(
        update is not None
        and update.graph is split.graph
        and update.name == name
        and update.inputs[1] is first.inputs[1]
        and not update.metadata_props
        for update, name in zip(updates, names, strict=True)
    )


def _gated(updates: list[ir.Node]) -> ir.Node | None:
    """The SiluMul of the results of two updates, if nothing else uses them."""
    results = [update.outputs[0] for update in updates]
    node = only_user(results[0])
    if not is_call(node, SILU_MUL_OPERATOR):
        return None
    alone = node.graph is updates[0].graph and all(only_user(value) is node for value in results)
    return node if alone and list(node.inputs) == results else None


def _replace(found: _Fused, name: str, before: ir.Node) -> None:
    """Put a call in the place of `before`, the first of the updates in the graph."""
    import onnx_ir as ir

    y, old = found.split.inputs[0], [found.gated] if found.gated else found.updates
    assert y is not None
    _, x, _, _, ids, ranks = found.updates[0].inputs
    factors = [value for update in found.updates for value in update.inputs[2:4]]
    targets = [update.attributes[TARGET].as_int() for update in found.updates]
    call = ir.node(
        name,
        [y, x, *factors, ids, ranks],
        attributes={_TARGETS: targets, _SIZES: found.sizes},
        domain=OPERATOR_DOMAIN,
        num_outputs=len(old),
        name=found.gated.name if found.gated else step_name(label_of_product(y), LORA_ADD),
    )
    if found.gated is not None:
        call.metadata_props.update(found.gated.metadata_props)
    graph = before.graph
    assert graph is not None
    graph.insert_before(before, call)
    for node, value in zip(old, call.outputs, strict=True):
        _take_over(node.outputs[0], value)
    graph.remove(dict.fromkeys([*old, *found.updates, found.split]), safe=True)


def _separate(graph: ir.Graph, call: ir.Node) -> None:
    """Replace a call by the calls and the Split that it stands for."""
    import onnx_ir as ir

    y, x, *factors, ids, ranks = _given(call)
    sizes, targets = (call.attributes[each].as_ints() for each in (_SIZES, _TARGETS))
    split = split_again(graph, call, y, sizes)
    nodes = []
    for at, (part, module) in enumerate(zip(split.outputs, modules_of(y), strict=True)):
        A, B = factors[2 * at : 2 * at + 2]
        update = ir.node(
            LORA_ADD_OPERATOR,
            [part, x, A, B, ids, ranks],
            attributes={TARGET: targets[at]},
            domain=OPERATOR_DOMAIN,
            name=step_name(module, LORA_ADD),
        )
        value = update.outputs[0]
        value.name, value.type, value.shape = update.name, part.type, part.shape
        nodes.append(update)
    results = nodes
    if call.op_type == LORA_SWIGLU_OPERATOR:
        parts = [update.outputs[0] for update in nodes]
        results = [ir.node(SILU_MUL_OPERATOR, parts, domain=OPERATOR_DOMAIN, name=call.name)]
        results[0].metadata_props.update(call.metadata_props)
        nodes = [*nodes, *results]
    body = call.graph
    assert body is not None
    body.insert_before(call, [split, *nodes])
    for old, node in zip(call.outputs, results, strict=True):
        _take_over(old, node.outputs[0])
    body.remove(call, safe=True)


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Give the users and the name of a value to another."""
    name = old.name
    replace_uses(old, new)
    new.name = name


def _given(call: ir.Node) -> list[ir.Value]:
    """The inputs of a call, which has all of its operator's."""
    inputs = [value for value in call.inputs if value is not None]
    layers = _LAYERS[call.op_type]
    known = all(
        name in call.attributes and len(call.attributes[name].as_ints()) == layers
        for name in (_SIZES, _TARGETS)
    )
    if len(inputs) != 4 + 2 * layers or not known:
        raise changed_call(call)
    return inputs


def _function(name: str, opset: int) -> ir.Function:
    """The function with the nodes that a call stands for."""
    import onnx_ir as ir

    count = _LAYERS[name]
    y, x = (ir.Value(name=each) for each in ("y", "x"))
    ids, ranks = (ir.Value(name=each) for each in (ADAPTER_IDS, ADAPTER_RANKS))
    pairs = [[ir.Value(name=f"{factor}_{at}") for factor in "AB"] for at in range(count)]
    sizes = ir.Node("", "Constant", [], [ir.RefAttr(_VALUE_INTS, _SIZES, ir.AttributeType.INTS)])
    split = ir.node(
        "Split", [y, sizes.outputs[0]], attributes={"axis": -1}, num_outputs=count, name="split"
    )
    nodes, results = [sizes, split], []
    for at, (part, (A, B)) in enumerate(zip(split.outputs, pairs, strict=True)):
        part.name = f"y_{at}"
        own = update_nodes(part, x, A, B, ids)
        for node in own:
            node.name = f"{node.name}_{at}"
        nodes += own
        results.append(own[-1].outputs[0])
    if name == LORA_SWIGLU_OPERATOR:
        own = gated_nodes(*results)
        nodes, results = [*nodes, *own], [own[-1].outputs[0]]
    sizes.outputs[0].name = _SIZES
    inputs = [y, x, *(value for pair in pairs for value in pair), ids, ranks]
    attributes = dict.fromkeys((_TARGETS, _SIZES), ir.AttributeType.INTS)
    return function_of(name, inputs, nodes, results, {"": opset}, attributes)
