"""`.onnx_adapter` files: adapters for ONNX Runtime's own LoraAdapter, in any of its languages."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.adapter_inputs.factors import branch_choice, side_inputs
from loradeploy.bundle.names import ADAPTER_MODE, NATIVE_SUFFIX
from loradeploy.disk import scratch_directory
from loradeploy.errors import AdapterError
from loradeploy.files import MAX_GRAPH_BYTES, atomic_file, copy_file, open_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter
    from loradeploy.bundle.adapter_inputs.base import BaseValues
    from loradeploy.bundle.manifest import Manifest

# Two version numbers that the writer may choose; nothing here reads them.
_ADAPTER_VERSION = 1
_MODEL_VERSION = 1
# The identifier of the format's flatbuffers, after an offset of four bytes.
_IDENTIFIER = b"TORT"


def write_onnx_adapter(
    adapter: Adapter,
    manifest: Manifest,
    file: str | os.PathLike[str],
    base: BaseValues | None = None,
) -> None:
    """Write `adapter` as an `.onnx_adapter` file for the bundle of `manifest`, atomically.

    The file has the side inputs by their names in the graph, with the scaling in B. DoRA and
    trained biases need the weights of `base`.

    Raises:
        AdapterMismatchError: the adapter does not fit the bundle.
        OutputError: the file cannot be written.
    """
    write_side_inputs(side_inputs(adapter, manifest, base), manifest, file)


def write_side_inputs(
    arrays: Mapping[str, NDArray[Any]], manifest: Manifest, file: str | os.PathLike[str]
) -> None:
    """Write one slot of side inputs as an `.onnx_adapter` file, atomically.

    If the graph has branches, the file selects the one with adapters.

    Raises:
        OutputError: the file cannot be written.
    """
    import onnxruntime

    arrays = {**arrays, **branch_choice(manifest)}
    content = onnxruntime.AdapterFormat()
    content.set_adapter_version(_ADAPTER_VERSION)
    content.set_model_version(_MODEL_VERSION)
    content.set_parameters(
        {name: onnxruntime.OrtValue.ortvalue_from_numpy(arrays[name]) for name in sorted(arrays)}
    )
    with atomic_file(file) as temporary:
        try:
            content.export_adapter(os.fspath(temporary))
        except TypeError:  # a path that is not UTF-8
            reason = "onnxruntime writes only to paths that are UTF-8"
            raise OSError(errno.EILSEQ, reason, str(file)) from None
        except RuntimeError:  # its text is a C++ source line
            raise OSError(errno.EIO, "onnxruntime failed to write it", str(file)) from None


def is_onnx_adapter(file: Path) -> bool:
    """Whether the content of `file` begins as one in this format."""
    with open_file(file, error=AdapterError) as content:
        return content.read(8)[4:] == _IDENTIFIER


def read_onnx_adapter(file: str | os.PathLike[str]) -> Mapping[str, NDArray[Any]]:
    """The side inputs in an `.onnx_adapter` file, by name, as copies.

    Raises:
        AdapterError: the file is missing, not an adapter, or has values that are not finite.
    """
    import onnxruntime

    path = Path(file)
    if not path.exists():
        raise AdapterError(f"{path} does not exist: give an .onnx_adapter file")
    try:
        # onnxruntime maps the file: truncating it would kill this process, so it gets a copy.
        with scratch_directory("loradeploy-adapter-") as scratch:
            copy = scratch / f"adapter{NATIVE_SUFFIX}"
            copy_file(path, copy, error=AdapterError, limit=MAX_GRAPH_BYTES)
            content = onnxruntime.AdapterFormat.read_adapter(os.fspath(copy))
            parameters = content.get_parameters()
            arrays = {name: value.numpy().copy() for name, value in parameters.items()}
            del content, parameters  # Windows cannot remove a mapped file
    except (RuntimeError, ValueError):  # its text is a C++ source line; or a name is not UTF-8
        raise AdapterError(f"{path} is truncated or not an .onnx_adapter file") from None
    arrays.pop(ADAPTER_MODE, None)  # selects a branch of the graph that the file was written for
    if quantized := next((name for name, v in arrays.items() if v.dtype.kind != "f"), None):
        raise AdapterError(
            f"{path}: {quantized} is {arrays[quantized].dtype}, and only floating point is read:"
            " give the PEFT directory that it was converted from"
        )
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise AdapterError(f"{path}: {name} has values that are not finite numbers")
    return arrays
