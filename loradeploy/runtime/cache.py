"""A decoder's keys and values from step to step.

A graph of ONNX's Attention gives the whole cache anew at each step, one position longer. One of
GroupQueryAttention writes into what it is given: a buffer of all positions that there can be, which
nothing is copied from or to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from loradeploy.bundle.names import PAST, PRESENT, RIGHT

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest, TensorSpec


class Cache:
    """What a decoder's graph takes and gives of its cache.

    `inputs`: past keys and values [batch, heads, past, size] by the graph's names, as they are
    fed. `places`: where the graph writes the present ones, by the names of its outputs; those that
    are not there it makes anew.
    """

    def __init__(
        self, manifest: Manifest, device: tuple[str, int], *, batch: int, positions: int
    ) -> None:
        specs = [spec for spec in manifest.inputs if spec.name.startswith(PAST)]
        in_place = manifest.padding == RIGHT  # the side that GroupQueryAttention pads on
        held = positions if in_place else 0
        self.inputs: dict[str, onnxruntime.OrtValue] = {
            spec.name: _zeros(spec, device, batch, held) for spec in specs
        }
        self.outputs = tuple(name.replace(PAST, PRESENT, 1) for name in self.inputs)
        self.places: Mapping[str, onnxruntime.OrtValue] = (
            dict(zip(self.outputs, self.inputs.values(), strict=True)) if in_place else {}
        )

    def keep(self, present: Sequence[onnxruntime.OrtValue]) -> None:
        """Go on from what a run gave, in the order of `outputs`."""
        self.inputs = dict(zip(self.inputs, present, strict=True))


def _zeros(
    spec: TensorSpec, device: tuple[str, int], batch: int, positions: int
) -> onnxruntime.OrtValue:
    _, heads, _, size = spec.shape
    # On the host, pages that no token has reached yet take no memory.
    values = np.zeros((batch, int(heads), positions, int(size)), spec.dtype)
    return onnxruntime.OrtValue.ortvalue_from_numpy(values, *device)
