"""The layout in which a checkpoint stores the weight of a linear layer.

The weight of nn.Linear is [out, in], that of transformers' Conv1D (GPT-2) is [in, out]. The graph
multiplies by either, so the layout of a fully trained weight is written into the metadata of the
nodes when the checkpoint is traced.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from loradeploy.adapter.config import AdapterConfig
from loradeploy.export.match.linears import Linear, find_linears

if TYPE_CHECKING:
    import onnx_ir as ir

_LAYOUT: Final = "loradeploy.layout"
_CONV1D: Final = "[in, out]"
_LINEAR: Final = "[out, in]"


def annotate_layouts(model: ir.Model, conv1d: Collection[str]) -> None:
    """Write the layout of its weight into the metadata of each linear layer if some are Conv1D.

    `conv1d`: the modules whose weight is [in, out].
    """
    if not conv1d:
        return
    for module, linear in find_linears(model).linears.items():
        for node in linear.nodes:
            node.metadata_props[_LAYOUT] = _CONV1D if module in conv1d else _LINEAR


def is_conv1d(linear: Linear) -> bool:
    """Whether the checkpoint's weight is known to be [in, out]."""
    return linear.nodes[0].metadata_props.get(_LAYOUT) == _CONV1D


def unclear_layout(linear: Linear, config: AdapterConfig) -> str | None:
    """Why the layout of a fully trained weight of an adapter is not known; None if it is.

    A square weight fits both ways. PEFT sets `fan_in_fan_out` for adapters of Conv1D layers.
    """
    known = _LAYOUT in linear.nodes[0].metadata_props
    if known or linear.in_features != linear.out_features or not config.fan_in_fan_out:
        return None
    return (
        "is square, and the graph does not show whether the checkpoint stores it as [in, out], as"
        " GPT-2 does: merge into the checkpoint"
    )
