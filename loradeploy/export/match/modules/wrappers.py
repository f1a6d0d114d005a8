"""Name embeddings, convolutions and norms of a graph as the checkpoint.

A weight that only one module of the checkpoint has proves the name. Other names (new norms are all
ones) are read from the nodes, and may differ by a prefix from those that weights prove: scripts
export a module that has the model as an attribute, so that nodes are named
`decoder.model.embed_tokens`; and a graph of the bare model lacks the prefix of the one with a head,
which the adapter was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loradeploy.export.graph.edit import constant_of
from loradeploy.export.graph.scopes import linear_scopes
from loradeploy.export.match.linears import Linear
from loradeploy.export.match.modules.naming import module_of
from loradeploy.export.match.whole.parts import find_parts, weights_of_parts

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


def name_parts(
    model: ir.Model,
    linears: Mapping[str, Linear],
    module_with: Callable[[NDArray[Any]], str | None],
) -> None:
    """Rename the parts by their weights, and others by the prefixes of the node names of `linears`.

    `module_with`: the module of the checkpoint that alone has a weight. Without it, nothing is
    renamed if the node names and modules of some linear layers differ in another way.
    """
    _rename_by_prefixes(model, linears)
    known: dict[ir.Value, str | None] = {}
    for node, weight in weights_of_parts(model):
        if weight not in known:
            known[weight] = module_with(constant_of(weight))
        module = known[weight]
        if module is not None and module not in linears:
            node.metadata_props.update(linear_scopes(module))


def _rename_by_prefixes(model: ir.Model, linears: Mapping[str, Linear]) -> None:
    found = {
        _prefixes(named[0], module)
        for module, linear in linears.items()
        for node in linear.nodes
        if linear.slice is None and (named := module_of(node)) is not None
    }
    prefixes = found.pop() if len(found) == 1 else None
    if prefixes is None or prefixes == ("", ""):
        return
    before, after = prefixes
    for module, part in find_parts(model).items():
        if module.startswith(before):
            for node in part.nodes:
                node.metadata_props.update(linear_scopes(after + module.removeprefix(before)))


def _prefixes(named: str, module: str) -> tuple[str, str] | None:
    """The prefixes of the node's name and of the module, if the rest of both is the same."""
    if f".{named}".endswith(f".{module}"):
        return named.removesuffix(module), ""
    return ("", module.removesuffix(named)) if module.endswith(f".{named}") else None
