"""`inspect`: describe the file or directory at a path."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from loradeploy.adapter.files.formats import other_directory, other_file
from loradeploy.adapter.files.peft import refuse_pickles
from loradeploy.bundle.names import MANIFEST_NAME, NATIVE_SUFFIX
from loradeploy.errors import AdapterError, LoraDeployError, UsageError
from loradeploy.inspection.adapter import (
    AdapterFacts,
    NativeAdapterFacts,
    TensorFileFacts,
    inspect_adapter,
    inspect_native,
    inspect_tensors,
)
from loradeploy.inspection.bundle import BundleFacts, inspect_bundle
from loradeploy.inspection.graph import GraphFacts, inspect_graph

Description = AdapterFacts | BundleFacts | GraphFacts | NativeAdapterFacts | TensorFileFacts

_ADAPTER_FILES: Final = "adapter_*"


def inspect(path: Path) -> Description:
    """Describe an adapter, a bundle, an ONNX file, an `.onnx_adapter` or a `.safetensors`.

    Raises:
        UsageError: `path` does not exist, or is none of these.
        AdapterError, BundleError: it cannot be read, or is an adapter of another library.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist: give an adapter, a bundle or an ONNX file")
    if path.is_dir():
        return _inspect_directory(path)
    match path.suffix:
        case ".onnx":
            return inspect_graph(path)
        case ".safetensors":
            return inspect_tensors(path)
        case suffix if suffix == NATIVE_SUFFIX:
            return inspect_native(path)
    raise _refusal(path, other_file(path))


def _inspect_directory(path: Path) -> Description:
    if (path / MANIFEST_NAME).is_file():
        return inspect_bundle(path)
    if any(path.glob(_ADAPTER_FILES)):
        return inspect_adapter(path)
    from loradeploy.export.read.files.repository import find_graph

    graph = find_graph(path)
    if graph is None:
        raise _refusal(path, other_directory(path))
    return inspect_graph(graph)


def _refusal(path: Path, recognized: str | None) -> LoraDeployError:
    """The error for what is not described; `recognized`: what it is, if that is known."""
    if recognized is not None:
        return AdapterError(f"{path} {recognized}")
    if path.is_file():
        refuse_pickles(path)
    return UsageError(f"{path} is not an adapter, a bundle or an ONNX file")
