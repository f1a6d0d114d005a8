"""The base's weights from which side inputs are computed, in the graph and in the bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.manifest import LoraTarget, Manifest, StoredWeight
from loradeploy.bundle.names import GRAPH_NAME
from loradeploy.export.graph.edit import constant_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_READABLE: Final = ("float32", "float16", "bfloat16")


class GraphWeights:
    """The base's weights in a graph during surgery; `biases`: by parameter name in the base."""

    def __init__(self, graph: ir.Graph, biases: Mapping[str, NDArray[np.float32]]) -> None:
        self._graph = graph
        self._biases = biases

    def weight(self, target: LoraTarget) -> NDArray[np.float32] | None:
        """See `bundle.adapter_inputs.base.BaseValues`; None if the weight is packed."""
        return _weight(self._graph.initializers[target.weight], target)

    def bias(self, module: str) -> NDArray[np.float32] | None:
        """See `bundle.adapter_inputs.base.BaseValues`."""
        return self._biases.get(f"{module}.bias")


def store_weights(
    directory: Path, manifest: Manifest
) -> tuple[Manifest, dict[str, NDArray[np.float32]]]:
    """Record in the manifest where the data file has the weights that DoRA and trained rows need.

    Also returns the weights that are too small for that file, [out, in] by `M.weight`.
    """
    import onnx_ir as ir

    if not _needed(manifest):
        return manifest, {}
    return stored_weights(ir.load(directory / GRAPH_NAME).graph.initializers, manifest)


def stored_weights(
    initializers: Mapping[str, ir.Value], manifest: Manifest
) -> tuple[Manifest, dict[str, NDArray[np.float32]]]:
    """As `store_weights`, for the initializers of a graph that has been written."""
    import onnx_ir as ir

    small: dict[str, NDArray[np.float32]] = {}
    targets, needed = [], _needed(manifest)
    for target in manifest.targets:
        value = initializers.get(target.weight)
        if target.module in needed and value is not None:
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                target = dataclasses.replace(target, stored=_stored(tensor))
            elif (weight := _weight(value, target)) is not None:
                small[f"{target.module}.weight"] = np.ascontiguousarray(weight)
        targets.append(target)
    return dataclasses.replace(manifest, targets=tuple(targets)), small


def _needed(manifest: Manifest) -> set[str]:
    """The modules whose weights DoRA and trained rows need."""
    scaled = {output.module for output in manifest.changed if output.scale is not None}
    own = {t.module for t in manifest.targets if f"{t.module}.weight" in manifest.own_weights}
    return scaled | own


def _stored(tensor: ir.ExternalTensor) -> StoredWeight | None:
    dtype = np.dtype(tensor.dtype.numpy()).name
    if dtype not in _READABLE or tensor.length is None:
        return None
    return StoredWeight(tensor.offset or 0, tensor.length, dtype)


def _weight(value: ir.Value, target: LoraTarget) -> NDArray[np.float32] | None:
    """The weight [out, in]; None if it is packed."""
    numbers: NDArray[Any] = constant_of(value)
    if numbers.dtype.name not in _READABLE:
        return None
    return (numbers if target.transposed else numbers.T).astype(np.float32, copy=False)
