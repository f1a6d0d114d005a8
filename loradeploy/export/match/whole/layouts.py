"""The layout in which a checkpoint stores the weight of a linear layer.

The weight of nn.Linear is [out, in], that of transformers' Conv1D (GPT-2) is [in, out]. The graph
multiplies by either, so the layout is written into the metadata of the nodes when the checkpoint is
traced, or when its weights identify the layers of a graph. Of other graphs, a fully trained weight
shows it, because it resembles the weight that it was trained from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.adapter import Adapter
from loradeploy.errors import AdapterMismatchError, listed
from loradeploy.export.graph.edit import constant_of
from loradeploy.export.match.linears import Linear

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_LAYOUT: Final = "loradeploy.layout"
_CONV1D: Final = "[in, out]"
_LINEAR: Final = "[out, in]"
# A distance below this part of another one is that of a weight to itself after training. Between
# unrelated weights of a model, distances are about equal.
_NEARER: Final = 0.5


def annotate_layouts(linears: Mapping[str, Linear], conv1d: Mapping[str, bool]) -> None:
    """Write the layouts of weights into the metadata of the nodes of `linears`.

    `conv1d`: of the modules whose layout is known, whether it is [in, out].
    """
    for module, linear in linears.items():
        if module in conv1d:
            annotate_layout(linear.nodes, conv1d=conv1d[module])


def annotate_layout(nodes: Sequence[ir.Node], *, conv1d: bool) -> None:
    """Write the layout of a weight, [in, out] if `conv1d`, into the metadata of `nodes`."""
    for node in nodes:
        node.metadata_props[_LAYOUT] = _CONV1D if conv1d else _LINEAR


def is_conv1d(linear: Linear) -> bool:
    """Whether the checkpoint's weight is known to be [in, out]."""
    return linear.nodes[0].metadata_props.get(_LAYOUT) == _CONV1D


def layout_of(node: ir.Node) -> dict[str, str]:
    """The metadata of the layout, for a node that replaces `node`; empty if it is not known."""
    layout = node.metadata_props.get(_LAYOUT)
    return {} if layout is None else {_LAYOUT: layout}


def settle_layouts(linears: Mapping[str, Linear], adapter: Adapter) -> None:
    """Annotate the layouts that the fully trained weights of `adapter` show, where not known.

    Raises:
        AdapterMismatchError: a weight is square, and resembles that of the graph in no layout.
    """
    problems = []
    for parameter, values in sorted(adapter.saved.items()):
        module = parameter.removesuffix(".weight")
        linear = linears.get(module)
        if (
            linear is None
            or module == parameter
            or _LAYOUT in linear.nodes[0].metadata_props
            or linear.quantized
            or linear.slice is not None
        ):
            continue
        conv1d = _shown(linear, values)
        if conv1d is not None:
            annotate_layout(linear.nodes, conv1d=conv1d)
        elif linear.in_features == linear.out_features and _in_numbered_layer(module):
            problems.append(
                f"{parameter} is square and does not resemble the weight in the graph, so that it"
                " is not known whether the checkpoint stores it as [in, out], as GPT-2 does: give"
                " `checkpoint`, the directory of the model that the graph was made from, or merge"
                " into that"
            )
    if problems:
        raise AdapterMismatchError(listed(problems, 1))


def _shown(linear: Linear, values: NDArray[Any]) -> bool | None:
    """Whether `values` are the graph's weight after training as [in, out]; None if not known."""
    numbers = constant_of(linear.weight)
    W = (numbers if linear.transposed else numbers.T).astype(np.float32)  # [out, in]
    S = values.astype(np.float32)
    if S.shape != W.shape:
        near = S.T.shape == W.shape and _distance(S.T, W) < _NEARER * float(np.linalg.norm(W))
        return True if near else None
    if linear.in_features != linear.out_features or np.array_equal(S, S.T):
        return False  # of a symmetric matrix, both are the same
    as_linear, as_conv1d = _distance(S, W), _distance(S.T, W)
    if as_conv1d < _NEARER * as_linear:
        return True
    return False if as_linear < _NEARER * as_conv1d else None


def _distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(one - other))


def _in_numbered_layer(module: str) -> bool:
    """Whether `module` is in a layer like `h.0`. No model has Conv1D elsewhere, as in its heads."""
    return any(part.isdecimal() for part in module.split("."))
