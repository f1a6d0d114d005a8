"""Bring computations of functions and branches into the main graph.

functions           are inlined
If with a product   is replaced by one branch if the condition is constant; if it is an input such
                    as use_cache_branch, by the branch with the cache, after both gave the same
                    results for an empty cache
other products      in branches and loops are refused by name if an adapter targets them
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.names import PAST
from loradeploy.errors import ExportError, first_line
from loradeploy.export.graph.edit import (
    bodies_of,
    constant_of,
    remove_all,
    remove_unused,
    replace_uses,
    source_of,
    taken_name,
    value_names,
)
from loradeploy.export.match.observe import open_model, sample_of
from loradeploy.export.match.products import products
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.bundle.sample import Feeds

logger = logger_of(__name__)

_BRANCHES: Final = ("else_branch", "then_branch")  # by the condition
# Nodes that may be between an input and the condition.
_CARRIERS: Final = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
# Relative rounding error allowed between two branches of one model.
_ROUNDING: Final = 1e-3
_REASON_LENGTH: Final = 120
# Rows and new positions after an empty cache: a prompt, and a single token.
_SIZES: Final = ((3, 5), (2, 1))


def inline_functions(model: ir.Model) -> None:
    """Inline the functions of the model.

    Raises:
        ExportError: a function cannot be inlined.
    """
    from onnx_ir.passes import common

    if model.functions:
        try:
            common.InlinePass()(model)
        except ValueError as problem:  # another opset, or a call with another number of inputs
            raise ExportError(
                f"the graph's functions cannot be inlined: {first_line(problem)}"
            ) from None
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]


def take_branches(model: ir.Model, directory: Path, config: Mapping[str, Any]) -> None:
    """Replace every If with products by one of its branches.

    `directory`: that of the graph's external data. `config`: that of the model.

    Raises:
        ExportError: an input selects between branches whose results differ.
    """
    graph = model.graph
    taken: dict[ir.Value, bool] = {}
    while (node := _next_choice(graph)) is not None:
        condition = source_of(node.inputs[0], _CARRIERS)
        assert condition is not None
        if condition.is_graph_input() and condition not in taken:
            branch = _branch_with_cache(graph, node)
            _check_same(model, condition, branch, directory, config)
            taken[condition] = branch
            logger.info("took the %s of %s", _BRANCHES[branch], node.name or node.op_type)
        choice = taken.get(condition)
        if choice is None:
            choice = bool(constant_of(condition).reshape(-1)[0])
        _inline_branch(graph, node, choice)
    remove_unused(graph)
    for value in taken:
        if not value.uses():
            graph.inputs.remove(value)
            graph.initializers.pop(str(value.name), None)


def take_branch(model: ir.Model, name: str, *, value: bool) -> None:
    """Replace every If that the input `name` controls by its branch for `value`.

    Raises:
        ExportError: there is none.
    """
    graph = model.graph
    nodes = [node for node in graph if node.op_type == "If" and _is_input(node, name)]
    if not nodes:
        raise ExportError(f"the graph has no branches that an input {name} selects")
    for node in nodes:
        _inline_branch(graph, node, value)
    remove_unused(graph)


def _is_input(node: ir.Node, name: str) -> bool:
    condition = source_of(node.inputs[0], _CARRIERS)
    return condition is not None and condition.is_graph_input() and condition.name == name


def enclosed_products(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node, ir.Value]]:
    """Products in branches and loops: the node of the main graph, the product and its weight."""
    for node in graph:
        for body in bodies_of(node):
            for product in products(body):
                yield node, product.node, product.weight
            for _, inner, weight in enclosed_products(body):
                yield node, inner, weight


def _next_choice(graph: ir.Graph) -> ir.Node | None:
    """The next If with products in it whose condition is constant or an input; None if none is."""
    for node in graph:
        if node.op_type != "If" or node.domain != "":
            continue
        condition = source_of(node.inputs[0], _CARRIERS)
        if condition is None or not (condition.is_graph_input() or condition.is_initializer()):
            continue
        if any(any(products(body)) or any(enclosed_products(body)) for body in bodies_of(node)):
            return node
    return None


def _branch_with_cache(graph: ir.Graph, node: ir.Node) -> bool:
    """The branch that uses more of the cache; `then_branch` if they do not differ."""
    cache = {value for value in graph.inputs if str(value.name).startswith(PAST)}
    uses = {
        branch: sum(value in cache for value in _used(node.attributes[name].as_graph()))
        for branch, name in enumerate(_BRANCHES)
    }
    return uses[True] >= uses[False]


def _used(body: ir.Graph) -> Iterator[ir.Value | None]:
    for node in body:
        yield from node.inputs
        for inner in bodies_of(node):
            yield from _used(inner)


def _check_same(
    model: ir.Model,
    condition: ir.Value,
    branch: bool,
    directory: Path,
    config: Mapping[str, Any],
) -> None:
    """Raise ExportError unless both branches give the same results with an empty cache."""
    name, sample = str(condition.name), sample_of(model, config)
    made = [sample.feeds(*rows_and_positions) for rows_and_positions in _SIZES]
    try:
        session = open_model(model, directory)
        pairs = [
            (_run(session, feeds, name, branch), _run(session, feeds, name, not branch))
            for feeds in made
        ]
    except Exception as problem:  # onnxruntime's exceptions have no common base class
        raise ExportError(
            f"the input {name} selects between two branches of the graph, which cannot be run here"
            f" to compare them: {first_line(problem)[:_REASON_LENGTH]}; export the model without"
            " branches, with a cache"
        ) from None
    for chosen, other in pairs:
        for output, a, b in zip(model.graph.outputs, chosen, other, strict=True):
            if a.shape != b.shape or not np.allclose(
                a, b, rtol=_ROUNDING, atol=_ROUNDING * float(np.abs(b).max(initial=0))
            ):
                advice = (
                    "give the directory with encoder_model.onnx, or decoder_model.onnx and"
                    " decoder_with_past_model.onnx, each for a bundle of its own"
                    if config.get("is_encoder_decoder")
                    else "export the model without branches, with a cache"
                )
                raise ExportError(
                    f"the input {name} selects between two branches of the graph, which give"
                    f" different {output.name} for an empty cache: {advice}"
                )


def _run(session: Any, feeds: Feeds, condition: str, value: bool) -> list[Any]:
    switch = np.full_like(feeds[condition], value)
    outputs: list[Any] = session.run(None, {**feeds, condition: switch})
    return outputs


def _inline_branch(graph: ir.Graph, node: ir.Node, choice: bool) -> None:
    """Replace the If `node` by the nodes and initializers of one branch."""
    import onnx_ir as ir

    body = node.attributes[_BRANCHES[choice]].as_graph()
    nodes, outputs = list(body), list(body.outputs)
    constants = list(body.initializers.values())
    for name in _BRANCHES:
        branch = node.attributes[name].as_graph()
        branch.outputs.clear()
        if name != _BRANCHES[choice]:
            remove_all(branch)
    body.remove(nodes)
    body.initializers.clear()
    names = value_names(graph)
    for value in constants:
        value.name = taken_name(names, str(value.name))
        if value.const_value is not None:
            value.const_value.name = value.name
        graph.register_initializer(value)
    for each in nodes:
        for value in each.outputs:
            if value.name:
                value.name = taken_name(names, value.name)
    graph.insert_before(node, nodes)
    last: ir.Node = node
    for old, new in zip(node.outputs, outputs, strict=True):
        if new.producer() not in nodes or new.is_graph_output():
            same = ir.node("Identity", [new])
            graph.insert_after(last, same)
            last, new = same, same.outputs[0]
            new.name = taken_name(names, f"{old.name}/chosen")
        known = new.type, new.shape
        replace_uses(old, new)
        new.type, new.shape = new.type or known[0], new.shape or known[1]
    graph.remove(node, safe=True)
