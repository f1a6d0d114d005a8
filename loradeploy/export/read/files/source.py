"""Find the base model: a checkpoint, an ONNX file, or a bundle."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from loradeploy.adapter.files.base_files import (
    graphs_in,
    has_weights,
    is_loadable,
    refuse_adapter,
    weight_files,
)
from loradeploy.adapter.files.formats import newest_checkpoint
from loradeploy.bundle.manifest import Manifest, read_manifest
from loradeploy.bundle.names import CONFIG_NAME, GRAPH_NAME, MANIFEST_NAME
from loradeploy.errors import ModelError, UsageError
from loradeploy.export.read.files.repository import (
    Parts,
    above,
    config_directory,
    find_graph,
    find_parts,
    tokenizer_directory,
)
from loradeploy.lora.base.checkpoint import (
    checkpoint_directory,
    fetch,
    is_hub_id,
    warn_of_unused_files,
)
from loradeploy.lora.base.formats import gguf_advice
from loradeploy.paths import expanded, resolved

# onnxruntime's own format, which other programs cannot read.
_RUNTIME_FORMAT: Final = ".ort"


@dataclass(frozen=True)
class Source:
    """A base model on disk.

    `directory`: has the config, if any, and the weights of a checkpoint.
    `assets`: the directory of the tokenizer.
    `graph`: the ONNX file; None for a checkpoint.
    `parts`: the graphs of an encoder-decoder in parts; `graph` is then the decoder with a cache.
    `manifest`: that of a bundle; None for other kinds.
    """

    kind: Literal["checkpoint", "onnx", "bundle"]
    name: str
    directory: Path
    assets: Path
    graph: Path | None = None
    manifest: Manifest | None = None
    parts: Parts | None = None


def resolve(model: str | os.PathLike[str], precision: str | None = None) -> Source:
    """Find the base model `model`: a directory, an ONNX file, a bundle or a Hugging Face id.

    `precision`: the requested one, which may select one of several ONNX files.

    Raises:
        ModelError: no usable model.
        UsageError: a directory with several ONNX files.
        BundleError: a bundle whose manifest is invalid.
    """
    text = os.fspath(model)
    path = expanded(text)
    if path.is_file():
        if path.suffix != ".onnx":
            if advice := gguf_advice(path):
                raise ModelError(advice)
            if path.suffix == _RUNTIME_FORMAT:
                raise ModelError(_of_runtime(path))
            raise ModelError(f"{path} is not a model: give a directory or an .onnx file")
        repository = above(path)
        return _of_graph(path, path.stem if repository is None else repository.name)
    if path.is_dir():
        return _in_directory(path, precision)
    if path.exists() or not is_hub_id(text):
        raise ModelError(f"{text} does not exist: give a model directory, an .onnx file or an id")
    fetched = fetch(text)
    refuse_adapter(fetched)
    if not any(fetched.glob("*.safetensors")) and not any(fetched.glob("*/*.safetensors")):
        raise ModelError(
            f"{text} has no .safetensors: give a repository with the PyTorch weights, or fetch"
            f" its ONNX graph (hf download {text} --local-dir DIR) and give the directory"
        )
    checkpoint = checkpoint_directory(fetched)
    return Source("checkpoint", text, checkpoint, checkpoint)


def check_options(
    source: Source, *, trust_remote_code: bool, evidence: bool, adapters: Iterable[Path]
) -> None:
    """Refuse options that are for another kind of source, and warn of unused files.

    `evidence`: whether a checkpoint or a map of modules is given. `adapters`: their directories.

    Raises:
        UsageError: such an option is given.
    """
    if trust_remote_code and source.graph is not None:
        raise UsageError(
            f"{source.name} is an ONNX graph, which has no Python code: `trust_remote_code` is for"
            " checkpoints"
        )
    if source.graph is None and evidence:
        raise UsageError(
            f"{source.name} is a checkpoint, which names its modules itself: `checkpoint` and"
            " `module_map` are for ONNX models"
        )
    if source.kind != "bundle":
        advice = "add it to the adapters, if it is not merged already"
        warn_of_unused_files(source.directory, advice, given=adapters)


def _of_graph(graph: Path, name: str) -> Source:
    directory, assets = config_directory(graph), tokenizer_directory(graph)
    return Source("onnx", name, directory, assets, graph)


def _in_directory(directory: Path, precision: str | None) -> Source:
    name = resolved(directory).name
    if (directory / MANIFEST_NAME).is_file():
        manifest = read_manifest(directory)
        return Source(
            "bundle", manifest.base.name, directory, directory, directory / GRAPH_NAME, manifest
        )
    checkpoint = checkpoint_directory(directory)
    if is_loadable(checkpoint) or (has_weights(checkpoint) and not graphs_in(directory)):
        refuse_adapter(checkpoint)
        if not (checkpoint / CONFIG_NAME).is_file():
            raise ModelError(
                f"{checkpoint} has weights but no config.json: it is not a model directory"
            )
        return Source("checkpoint", name, checkpoint, checkpoint)
    if (parts := find_parts(directory, precision)) is not None:
        return dataclasses.replace(_of_graph(parts.further, name), parts=parts)
    graph = find_graph(directory, precision)
    if graph is None:
        if advice := gguf_advice(directory):
            raise ModelError(advice)
        refuse_adapter(directory)
        if newest := newest_checkpoint(
            path.parent.name for path in directory.glob("*/config.json")
        ):
            raise ModelError(
                f"{directory} is not a model itself but has checkpoints of a training run: give the"
                f" newest, {directory / newest}"
            )
        if converted := sorted(directory.glob(f"*{_RUNTIME_FORMAT}")):
            raise ModelError(_of_runtime(converted[0]))
        weight_files(checkpoint)  # its error names what the directory has instead
        raise ModelError(f"{directory} has no model")
    return _of_graph(graph, name)


def _of_runtime(path: Path) -> str:
    """What to do about a graph in onnxruntime's own format."""
    return (
        f"{path} is in onnxruntime's own format, which cannot be changed: give the .onnx file that"
        " it was converted from"
    )
