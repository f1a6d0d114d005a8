"""Refuse adapters for layers inside branches and loops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import name_of
from loradeploy.export.match.linears import Findings
from loradeploy.export.match.modules.naming import module_of
from loradeploy.export.read.subgraphs import enclosed_products

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.adapter.adapter import Adapter

_AN: Final = "AEIO"


def check_reached(graph: ir.Graph, findings: Findings, adapters: Iterable[Adapter]) -> None:
    """Raise ExportError if a layer that an adapter targets is inside a branch or loop.

    It is also an error if a layer of the main graph is computed in a branch or loop too.
    """
    targeted = {
        module
        for adapter in adapters
        for module, pair in adapter.factors.items()
        if pair.kind == "linear"
    }
    missing = sorted(targeted - findings.linears.keys())
    enclosed = list(enclosed_products(graph))
    owners = {linear.weight: module for module, linear in findings.linears.items()}
    for outer, node, weight in enclosed:
        named = module_of(node)
        module = owners.get(weight) or (None if named is None else named[0])
        if weight in owners or module in targeted or module in findings.linears:
            raise _enclosed(str(module), outer, len(enclosed))
    if enclosed and (missing or not findings.linears):
        raise _enclosed(missing[0] if missing else "every layer", enclosed[0][0], len(enclosed))


def _enclosed(module: str, outer: ir.Node, count: int) -> ExportError:
    kind = f"{'an' if outer.op_type[0] in _AN else 'a'} {outer.op_type}"
    why = "whose condition the graph computes, " if outer.op_type == "If" else ""
    return ExportError(
        f"{module} is not only in the main graph: {count} products are inside {kind}"
        f" ({name_of(outer)}), {why}where adapters cannot be applied:"
        " export the model without it"
    )
