"""Read weights and biases of the base model, from which some side inputs are computed.

DoRA's scale needs the base's weights, which are read from model.onnx.data at the location in the
manifest. Offsets need the biases that the graph adds. These biases, and weights that are too small
for the data file, are in base.safetensors: `M.bias` [out], `M.weight` [out, in].
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.bundle.names import BASE_NAME, GRAPH_DATA_NAME
from loradeploy.errors import BundleError
from loradeploy.files import check_file, inside

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import LoraTarget, Manifest


class BaseValues(Protocol):
    """Weights and biases of a base model, by module."""

    def weight(self, target: LoraTarget) -> NDArray[np.float32] | None:
        """The weight as [out, in], float32 (an embedding's is [size, vocabulary])."""

    def bias(self, module: str) -> NDArray[np.float32] | None:
        """The bias [out] that the graph adds to the module's output, float32."""


class BundleBase:
    """The base of the bundle in `directory`; files are opened when needed.

    `check_data`: raises if the data file changed since the bundle was opened.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, check_data: Callable[[], None] = lambda: None
    ) -> None:
        self._directory = directory
        self._manifest = manifest
        self._check_data = check_data
        self._small: Mapping[str, NDArray[Any]] | None = None

    def weight(self, target: LoraTarget) -> NDArray[np.float32] | None:
        """See `BaseValues`; None if the weight is quantized, or its location is unknown.

        Raises:
            BundleError: the data file is missing or too short.
        """
        small = self._values(target.module, "weight", (target.out_features, target.in_features))
        if small is not None or target.stored is None:
            return small
        stored = target.stored
        shape = (target.in_features, target.out_features)
        if target.transposed:
            shape = shape[::-1]
        file = inside(self._directory, GRAPH_DATA_NAME)
        check_file(file, error=BundleError)
        short = stored.dtype == "bfloat16"  # the upper half of a float32; numpy has no such type
        kind = np.dtype(np.uint16 if short else stored.dtype)
        try:
            # Not mapped: truncating a mapped file would kill this process.
            read = np.fromfile(file, kind, shape[0] * shape[1], offset=stored.offset)
            found = read.reshape(shape)
        except (OSError, ValueError, MemoryError):
            raise BundleError(
                f"{file} does not contain the weight of {target.module}: export again"
            ) from None
        self._check_data()
        values = (found.astype(np.uint32) << 16).view(np.float32) if short else found
        return (values if target.transposed else values.T).astype(np.float32, copy=False)

    def bias(self, module: str) -> NDArray[np.float32] | None:
        """See `BaseValues`; None if the base has no bias.

        Raises:
            BundleError: base.safetensors is invalid.
        """
        sizes = {output.module: output.size for output in self._manifest.changed}
        return self._values(module, "bias", (sizes[module],))

    def _values(self, module: str, part: str, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        if self._small is None:
            file = self._directory / BASE_NAME
            self._small = read_arrays(file, error=BundleError)[0] if file.is_file() else {}
        values = self._small.get(f"{module}.{part}")
        if values is None:
            return None
        if values.shape != shape:
            raise BundleError(
                f"{self._directory / BASE_NAME}: {module}.{part} is {list(values.shape)}, the"
                f" manifest has {list(shape)}: export again"
            )
        return values.astype(np.float32, copy=False)
