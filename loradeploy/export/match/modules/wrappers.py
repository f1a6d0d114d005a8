"""Name embeddings, convolutions and norms of a graph as its linear layers.

The checkpoint's weights prove the names of linear layers. Those of other layers are read from the
nodes, and may differ by a prefix: scripts export a module that has the model as an attribute, so
that nodes are named `decoder.model.embed_tokens`; and a graph of the bare model lacks the prefix of
the one with a head, which the adapter was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loradeploy.export.graph.scopes import linear_scopes
from loradeploy.export.match.linears import Linear
from loradeploy.export.match.modules.naming import module_of
from loradeploy.export.match.whole.parts import find_parts

if TYPE_CHECKING:
    import onnx_ir as ir


def name_parts(model: ir.Model, linears: Mapping[str, Linear]) -> None:
    """Rename the parts by the prefixes in which the node names of all `linears` differ.

    Nothing is renamed if the node names and modules of some linear layers differ in another way.
    """
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
