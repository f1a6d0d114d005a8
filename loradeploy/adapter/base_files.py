"""Which files of a model directory hold the base's weights: those that transformers loads.

    the file or index that config.json names as transformers_weights, else
    model.safetensors, else the shards of model.safetensors.index.json

All else that lies there (an adapter, an optimizer's state, consolidated.safetensors, shards of an
earlier save) is not the model, and part of neither its weights nor its digest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.config import CONFIG_NAME
from loradeploy.adapter.tensors import StoredTensor, map_tensors
from loradeploy.errors import ModelError
from loradeploy.files import read_json

SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
GRAPHS_FOLDER: Final = "onnx"  # of a repository for transformers.js
_MODEL_CONFIG: Final = "config.json"
_NAMED: Final = "transformers_weights"
_INDEX_ENDING: Final = ".safetensors.index.json"
_ADAPTERS: Final = "adapter_*"
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# transformers takes these before all others, and all that lies beside them too.
_DISTRIBUTED: Final = "shard-[0-9]*-model-[0-9]*-of-[0-9]*.safetensors"

# Names that PEFT gives to what it puts into a model, as a whole step of a module's path.
_PEFT_PART: Final = re.compile(
    r"(?:^|\.)(?:base_model\.model|base_layer|original_module|modules_to_save|(?:lora|ia3)_\w+)"
    r"(?=\.|$)"
)


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of the base model in `directory`, in name order.

    Raises:
        ModelError: there are none that transformers loads, or shards of the index are missing.
    """
    named = _named(directory)
    index = named if named is not None and named.name.endswith(_INDEX_ENDING) else None
    if named is None and any(directory.glob(_DISTRIBUTED)):
        raise ModelError(
            f"{directory} holds the shards of a distributed checkpoint: load it with transformers"
            " and save it with save_pretrained"
        )
    if named is not None and index is None:
        return (named,)
    if index is None:
        if (directory / SINGLE_NAME).is_file():
            return (directory / SINGLE_NAME,)
        index = directory / INDEX_NAME
        if not index.is_file():
            raise ModelError(_nothing(directory))
    return _shards(index)


def base_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of the base model in `directory`, mapped.

    Raises:
        ModelError: as `weight_files`, or a file is broken.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(directory):
        tensors.update(map_tensors(file, error=ModelError)[0])
    return tensors


def is_loadable(directory: Path) -> bool:
    """Whether `directory` holds what transformers loads, as far as names tell."""
    usual = any((directory / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    return usual or _named(directory) is not None


def holds_weights(directory: Path) -> bool:
    """Whether there are safetensors that could be a base model's, and are no adapter's."""
    found = directory.glob("*.safetensors")
    return is_loadable(directory) or any(not file.match(_ADAPTERS) for file in found)


def graphs_in(directory: Path) -> list[Path]:
    """The ONNX files of `directory`: its own, else those in its folder onnx/."""
    own = sorted(directory.glob("*.onnx"))
    return own or sorted((directory / GRAPHS_FOLDER).glob("*.onnx"))


def adapter_beside(directory: Path) -> bool:
    """Whether `directory` holds an adapter in PEFT's files, beside a base model or alone."""
    return (directory / CONFIG_NAME).is_file()


def refuse_adapter(directory: Path) -> None:
    """Raise ModelError where `directory` is an adapter and no model."""
    whole = (directory / _MODEL_CONFIG).is_file() and holds_weights(directory)
    if not adapter_beside(directory) or whole:
        return
    base = read_json(directory / CONFIG_NAME, error=ModelError).get("base_model_name_or_path")
    named = f" ({base})" if isinstance(base, str) and base else ""
    raise ModelError(
        f"{directory} is an adapter: give its base as the model{named}, and this as an adapter"
    )


def stray_weights(directory: Path) -> str | None:
    """What a reader may take for the model's weights and is not; None where there is nothing."""
    both = all((directory / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    if not both or _named(directory) is not None:
        return None
    return f"{INDEX_NAME} and its shards, because {SINGLE_NAME} comes first, as in transformers"


def peft_parts(names: Collection[str]) -> list[str]:
    """Those of `names`, of modules or tensors, that PEFT gives: none is a plain model's."""
    return sorted(name for name in names if _PEFT_PART.search(name))


def check_plain(directory: Path, names: Collection[str]) -> None:
    """Raise ModelError where tensors or modules called `names` are of a model wrapped by PEFT."""
    if parts := peft_parts(names):
        raise ModelError(
            f"{directory} holds a model that was saved with PEFT's layers in it ({parts[0]}"
            f"{f' and {len(parts) - 1} more' if len(parts) > 1 else ''}): save the result of"
            " merge_and_unload(), or the base and the adapter apart"
        )


def _named(directory: Path) -> Path | None:
    """The file that config.json names for the weights."""
    file = directory / _MODEL_CONFIG
    config: Mapping[str, Any] = (
        read_json(file, error=ModelError, finite=False) if file.is_file() else {}
    )
    name = config.get(_NAMED)
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", _INDEX_ENDING)):
        raise ModelError(f"{file}: {_NAMED} is {name!r}, the name of safetensors is needed")
    found = _within(directory, name, file)
    if not found.is_file():
        raise ModelError(f"{file}: {_NAMED} is {name!r}, and no such file is in {directory}")
    return found


def _shards(index: Path) -> tuple[Path, ...]:
    told = read_json(index, error=ModelError).get("weight_map")
    if not isinstance(told, dict) or not told:
        raise ModelError(f"{index} has no weight_map: it is no index of a checkpoint")
    names = sorted({str(name) for name in told.values()})
    files = [_within(index.parent, name, index) for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if not file.is_file()]
    if missing:
        raise ModelError(
            f"{index} names {missing[0]}, which is not there"
            f"{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}: the checkpoint is"
            " not complete, fetch or copy it again"
        )
    return tuple(files)


def _within(directory: Path, name: str, told_by: Path) -> Path:
    # By its name, not by where links lead: a snapshot of the hub is links to another folder.
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ModelError(
            f"{told_by} names {name!r}, which leads out of {directory}: only files inside it are"
            " read"
        )
    return directory / name


def _nothing(directory: Path) -> str:
    others = sorted(
        file.name for file in directory.glob("*.safetensors") if not file.match(_ADAPTERS)
    )
    if others:
        return (
            f"{directory} holds no {SINGLE_NAME} and no {INDEX_NAME}, and {others[0]} is none that"
            " transformers loads by itself: name it in config.json as transformers_weights, or"
            " save the model with save_pretrained"
        )
    pickles = sorted(file.name for kind in _PICKLES for file in directory.glob(kind))
    if pickles:
        return (
            f"{directory} holds no .safetensors file but {pickles[0]}, a pickle, which runs code"
            " when it is read: if you trust it, load it with transformers and save it with"
            " save_pretrained"
        )
    return (
        f"{directory} holds neither .safetensors nor .onnx files: save the model with transformers"
    )
