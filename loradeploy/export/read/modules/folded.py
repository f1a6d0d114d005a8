"""Refuse adapters for convolutions and embeddings whose weights are not those of their modules.

    BatchNorm(conv(x, W))     →     conv(x, s · W) + b

torch.onnx's older exporter and onnxruntime's optimizer fold a norm, or a factor, into the weight of
the convolution before it. The node keeps the convolution's name, and an update that is added to its
weight would lack the factor.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import constant_of, name_of
from loradeploy.export.graph.scopes import linear_scopes
from loradeploy.export.match.whole.parts import find_parts

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.export.match.modules.identity import CheckpointWeights

# The name that a layer with another weight than its module's gets below the module.
_CHANGED: Final = "folded"
_REMEDY: Final = (
    "export the checkpoint in place of the graph, or merge the adapter in PyTorch before the graph"
    " is exported"
)


def refuse_folded(
    model: ir.Model, targeted: Collection[str], weights: CheckpointWeights | None
) -> None:
    """Raise ExportError if an adapter targets a layer into whose weight something was folded.

    Without the checkpoint's `weights`, a convolution is judged by the name of its weight, which
    exporters keep if they do not change it: `onnx::Conv_63` is a new constant. With them, other
    convolutions that differ lose their name, for adapters that are merged later.
    """
    for named, part in find_parts(model).items():
        if part.kind == "norm":
            continue
        module = next((each for each in targeted if _is_same(each, named)), None)
        kept = str(part.weight.name).endswith(f"{named.rpartition('.')[2]}.weight")
        where = (
            f"{module} cannot take an adapter: the weight {part.weight.name} of its node"
            f" {name_of(part.nodes[0])}"
        )
        if weights is None:
            if module is not None and part.kind == "conv2d" and not kept:
                raise ExportError(
                    f"{where} is not named after it, as if a norm or a factor was folded into it:"
                    f" give `checkpoint` to compare the weights; if they differ, {_REMEDY}"
                )
        elif weights.contradicts(named, constant_of(part.weight)):
            if module is not None:
                raise ExportError(
                    f"{where} is not {module}.weight of the checkpoint; a norm or a factor may have"
                    f" been folded into it: {_REMEDY}"
                )
            if part.kind == "conv2d":
                for node in part.nodes:
                    node.metadata_props.update(linear_scopes(f"{named}.{_CHANGED}"))


def _is_same(one: str, other: str) -> bool:
    """Whether two paths are of one module, up to the prefix of a wrapper."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")
