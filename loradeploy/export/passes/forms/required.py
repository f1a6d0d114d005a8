"""Write a second graph for clients that feed required inputs only.

Some bindings of ONNX Runtime feed only inputs without defaults: onnxruntime-node silently drops
feeds for the others, and computes the base model. For them `required.onnx` has the side inputs
without defaults, beside model.onnx and with the same weights. `required.safetensors` has the base's
values of all side inputs, `adapters/NAME.safetensors` those of an adapter, so that a client feeds
one file as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.tensors import write_arrays
from loradeploy.bundle.adapter_inputs.factors import branch_choice
from loradeploy.bundle.names import (
    ADAPTER_RANKS,
    ADAPTERS_DIRECTORY,
    GRAPH_NAME,
    INPUTS_EMBEDS,
    INPUTS_EMBEDS_MASK,
    LOGITS_TO_KEEP,
    MROPE_POSITION_IDS,
    REQUIRED_NAME,
    REQUIRED_VALUES_NAME,
)
from loradeploy.bundle.run_target import zeros_have_rank_one
from loradeploy.export.graph.edit import constant_of
from loradeploy.files import atomic_file

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest

# Inputs that keep their defaults: logits of all positions, text only, adapters of the whole rank.
_LEFT_OUT: Final = (
    LOGITS_TO_KEEP,
    ADAPTER_RANKS,
    INPUTS_EMBEDS,
    INPUTS_EMBEDS_MASK,
    MROPE_POSITION_IDS,
)


def write_required(
    directory: Path, manifest: Manifest, adapters: Mapping[str, Mapping[str, NDArray[Any]]]
) -> None:
    """Write the files into the bundle of `manifest` in `directory`.

    `adapters`: side inputs by adapter and name.
    """
    import onnx_ir as ir

    model, base = required_graph(ir.load(directory / GRAPH_NAME), manifest)
    with atomic_file(directory / REQUIRED_NAME) as temporary:
        ir.save(model, temporary)
    write_arrays(directory / REQUIRED_VALUES_NAME, base, {})
    for name, own in adapters.items():
        arrays = {**base, **own, **branch_choice(manifest)}
        write_arrays(directory / ADAPTERS_DIRECTORY / f"{name}.safetensors", arrays, {})


def required_graph(model: ir.Model, manifest: Manifest) -> tuple[ir.Model, dict[str, NDArray[Any]]]:
    """Make the graph with required inputs of `model`, which is changed, and the base's values."""
    base: dict[str, NDArray[Any]] = {}
    for value in list(model.graph.inputs):
        if value.name in _LEFT_OUT:
            model.graph.inputs.remove(value)
        elif value.is_initializer():
            name = str(value.name)
            base[name] = np.array(constant_of(value))
            model.graph.initializers.pop(name)
            value.const_value = None
    return model, of_least_rank(base, manifest) if zeros_have_rank_one(manifest.target) else base


def of_least_rank(
    arrays: Mapping[str, NDArray[Any]], manifest: Manifest
) -> dict[str, NDArray[Any]]:
    """Replace factors of rank 0 by zeros of the least rank: 1, or the number of experts."""
    ranks = {name: t.rank_from(1) for t in manifest.targets for name in t.factors}
    return {
        name: values
        if values.size
        else np.zeros([size or ranks.get(name, 1) for size in values.shape], values.dtype)
        for name, values in arrays.items()
    }
