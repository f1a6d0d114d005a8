"""Reasons why an identified layer takes no adapters, each found by one function of the layer."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import constant_of, name_of
from loradeploy.export.match.feature_order import reordering_node
from loradeploy.export.match.linears import Findings, Linear
from loradeploy.export.match.operators import is_unreached
from loradeploy.export.match.own_factors import own_factor, unnamed_factor
from loradeploy.export.match.products import products
from loradeploy.export.read.products.later_calls import similar_later_calls
from loradeploy.export.read.products.normalize import SCALE
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logger_of(__name__)


@dataclass(frozen=True)
class Doubt:
    """Why a layer takes no adapters. `warning`: the warning if no adapter targets the layer."""

    reason: str
    warning: str | None = None


def without_doubtful(
    findings: Findings, targeted: Container[str], doubt: Callable[[Linear], Doubt | None]
) -> Findings:
    """The findings without the layers for which `doubt` gives a reason to take no adapters.

    `targeted`: the modules that adapters change.

    Raises:
        ExportError: an adapter targets one of these layers.
    """
    kept, left = dict(findings.linears), list(findings.unidentified)
    for module, linear in findings.linears.items():
        if (found := doubt(linear)) is None:
            continue
        if module in targeted:
            raise ExportError(f"{module}: {found.reason}")
        if found.warning:
            logger.warning("left without adapters, %s: %s", module, found.warning)
        del kept[module]
        left.append(f"{linear.nodes[0].name} [{linear.in_features} → {linear.out_features}]")
    return Findings(kept, tuple(left))


_IN_DOUBT: Final = (
    "names do not show whether its weight is the checkpoint's or was divided by that: give"
    " `checkpoint`"
)


def scaled(linear: Linear) -> Doubt | None:
    """Doubt about a product with a factor, which names alone do not explain.

    With y = α x W, the adapter's update is scaled by α if W is the checkpoint's matrix, but not if
    W was divided by α.
    """
    node = linear.nodes[0]
    alpha = node.metadata_props.get(SCALE)
    if alpha is None:
        return None
    return Doubt(f"{node.name} multiplies its product by {alpha}, and {_IN_DOUBT}")


def scaled_beside(linear: Linear) -> Doubt | None:
    """The same doubt about a node before or after the product that belongs to no module."""
    factor = unnamed_factor(linear)
    if factor is None:
        return None
    where = f"{name_of(factor)}, no node of a module, scales the product {linear.nodes[0].name}"
    return Doubt(f"{where}, and {_IN_DOUBT}")


def reordered(linear: Linear) -> Doubt | None:
    """Doubt about a layer whose features the graph reorders."""
    node = reordering_node(linear)
    if node is None:
        return None
    where = name_of(node)
    return Doubt(
        f"{where} ({node.op_type}) puts its features into another order, so that"
        " the rows of its weight are likely in another order too, unless the model itself"
        " orders them so: give `checkpoint`, whose numbers show it; a map does not",
        warning=f"{where} reorders its features",
    )


def scaled_by_module(linear: Linear) -> Doubt | None:
    """Doubt about a module with a factor, which would scale an adapter's update too."""
    factor = own_factor(linear)
    if factor is None:
        return None
    return Doubt(
        f"its node {factor.name} scales the product {linear.nodes[0].name}, and"
        " would scale what an adapter adds to it: give the graph of a module without a"
        " factor of its own"
    )


def called_elsewhere(graph: ir.Graph, findings: Findings) -> Callable[[Linear], Doubt | None]:
    """Doubt about layers whose weight another product, of no known module, uses too.

    It may be another call of the layer, which would not get the adapter.
    """
    others = _unknown_users(graph, findings)

    def doubt(linear: Linear) -> Doubt | None:
        other = others.get(linear.weight)
        if other is None:
            return None
        where = name_of(other)
        return Doubt(
            f"{where} has the same weight, and no name says whether it is another call of this"
            " module: identify it in `module_map`",
            warning=f"{where}, of no known module, has the same weight",
        )

    return doubt


def called_with_other_weight(
    graph: ir.Graph, findings: Findings, targeted: Container[str]
) -> Callable[[Linear], Doubt | None]:
    """Doubt about layers that may be called twice, with two copies of a weight that differ."""
    pairs = {
        linear.module: (first.module, later.module)
        for first, later in similar_later_calls(graph, findings.linears)
        for linear in (first, later)
        if later.module not in targeted  # else two modules
    }

    def doubt(linear: Linear) -> Doubt | None:
        if linear.module not in pairs:
            return None
        first, later = pairs[linear.module]
        return Doubt(
            f"{later} may be another call of it, with a copy of its weight that differs, as if only"
            " one was quantized: give the graph before that",
            warning=f"{first} and {later} may be one module with two different weights",
        )

    return doubt


def _unknown_users(graph: ir.Graph, findings: Findings) -> dict[ir.Value, ir.Node]:
    """By weight of a layer: a node of no known module that uses it too."""
    linears = findings.linears.values()
    known = {node for linear in linears for node in linear.nodes}
    found = {p.weight: p.node for p in products(graph) if p.node not in known}
    for node in graph:  # a later call may be fused with others, as ALBERT's into Attention
        if is_unreached(node):
            for linear in linears:
                if any(v is not None and _contains(v, linear) for v in node.inputs):
                    found[linear.weight] = node
    return found


def _contains(value: ir.Value, linear: Linear) -> bool:
    """Whether a constant [in, outputs of several layers] has the weight of `linear` as a part."""
    size, constant = linear.out_features, value.const_value
    if linear.quantized or constant is None or linear.weight.const_value is None:
        return False
    shape = constant.shape.numpy()
    if len(shape) != 2 or shape[0] != linear.in_features or shape[1] % size:
        return False
    weight, columns = constant_of(linear.weight), constant_of(value)
    weight = weight.T if linear.transposed else weight
    return any(
        np.array_equal(columns[:, at : at + size], weight) for at in range(0, shape[1], size)
    )
