"""Where a base model comes from: a checkpoint, an ONNX file, or a bundle."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loradeploy.adapter.config import CONFIG_NAME
from loradeploy.bundle.manifest import Manifest, read_manifest
from loradeploy.bundle.names import GRAPH_NAME, MANIFEST_NAME
from loradeploy.errors import ModelError, UsageError
from loradeploy.lora.checkpoint import fetch, is_hub_id


@dataclass(frozen=True)
class Source:
    """A base model on disk.

    `directory`: holds config and tokenizer, where there are any.
    `graph`: the ONNX file, None for a checkpoint.
    `manifest`: of a bundle, None for the other kinds.
    """

    kind: Literal["checkpoint", "onnx", "bundle"]
    name: str
    directory: Path
    graph: Path | None = None
    manifest: Manifest | None = None


def resolve(model: str | os.PathLike[str]) -> Source:
    """The base model that `model` names: a directory, an ONNX file, a bundle or a hub's id.

    Raises:
        ModelError: nothing usable is there.
        UsageError: a directory with several ONNX files.
        BundleError: a bundle whose manifest is broken.
    """
    text = os.fspath(model)
    place = Path(text).expanduser()
    if place.is_file():
        if place.suffix != ".onnx":
            raise ModelError(f"{place} is no model: give a directory or an .onnx file")
        return Source("onnx", place.stem, place.parent, graph=place)
    if place.is_dir():
        return _in_directory(place)
    if place.exists() or not is_hub_id(text):
        raise ModelError(f"{text} does not exist: give a model directory, an .onnx file or an id")
    return Source("checkpoint", text, fetch(text))


def _in_directory(place: Path) -> Source:
    name = place.resolve().name
    if (place / MANIFEST_NAME).is_file():
        manifest = read_manifest(place)
        return Source("bundle", manifest.base.name, place, place / GRAPH_NAME, manifest)
    if (place / CONFIG_NAME).is_file() and not (place / "config.json").is_file():
        raise ModelError(
            f"{place} is an adapter: give its base as the model, and this as an adapter"
        )
    if any(place.glob("*.safetensors")):
        if not (place / "config.json").is_file():
            raise ModelError(f"{place} holds weights but no config.json: it is no model directory")
        return Source("checkpoint", name, place)
    graphs = sorted(place.glob("*.onnx"))
    if not graphs:
        raise ModelError(
            f"{place} holds neither .safetensors nor .onnx files: save the model with transformers"
        )
    named = [graph for graph in graphs if graph.name == GRAPH_NAME]
    if len(graphs) > 1 and not named:
        listed = ", ".join(graph.name for graph in graphs)
        raise UsageError(f"{place} holds several ONNX files, name one of them: {listed}")
    return Source("onnx", name, place, graph=(named or graphs)[0])
