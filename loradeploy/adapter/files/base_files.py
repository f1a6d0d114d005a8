"""Find the weight files of a base model: those that transformers loads.

    the file or index that config.json names as transformers_weights, else
    model.safetensors, else the shards of model.safetensors.index.json

Other files in the directory (an adapter, an optimizer's state, consolidated.safetensors, shards of
an earlier save) are not part of the model, of its weights or of its digest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.files.tensors import StoredTensor, map_tensors
from loradeploy.errors import ModelError
from loradeploy.files import read_json
from loradeploy.names import ADAPTER_CONFIG_NAME, MODEL_CONFIG_NAME

SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
GRAPHS_FOLDER: Final = "onnx"  # used by repositories for transformers.js
_NAMED: Final = "transformers_weights"
_INDEX_ENDING: Final = ".safetensors.index.json"
_ADAPTERS: Final = "adapter_*"
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# transformers prefers these to all others, and also loads all files beside them.
_DISTRIBUTED: Final = "shard-[0-9]*-model-[0-9]*-of-[0-9]*.safetensors"

# Names of the modules that PEFT inserts into a model, as one part of a dotted path.
_PEFT_PART: Final = re.compile(
    r"(?:^|\.)(?:base_model\.model|base_layer|original_module|modules_to_save|(?:lora|ia3)_\w+)"
    r"(?=\.|$)"
)


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of the base model in `directory`, in name order.

    Raises:
        ModelError: no such files, or shards that the index lists are missing.
    """
    named = _named(directory)
    index = named if named is not None and named.name.endswith(_INDEX_ENDING) else None
    if named is None and any(directory.glob(_DISTRIBUTED)):
        raise ModelError(
            f"{directory} has the shards of a distributed checkpoint: load it with transformers"
            " and save it with save_pretrained"
        )
    if named is not None and index is None:
        return (named,)
    if index is None:
        if (directory / SINGLE_NAME).is_file():
            return (directory / SINGLE_NAME,)
        index = directory / INDEX_NAME
        if not index.is_file():
            raise ModelError(_no_weights(directory))
    return _shards(index)


def base_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of the base model in `directory`, memory-mapped.

    Raises:
        ModelError: as `weight_files`, or a file is invalid.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(directory):
        tensors.update(map_tensors(file, error=ModelError)[0])
    return tensors


def is_loadable(directory: Path) -> bool:
    """Whether `directory` has files with the names that transformers loads."""
    usual = any((directory / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    return usual or _named(directory) is not None


def has_weights(directory: Path) -> bool:
    """Whether `directory` has safetensors that may be a base model's, not an adapter's."""
    found = directory.glob("*.safetensors")
    return is_loadable(directory) or any(not file.match(_ADAPTERS) for file in found)


def graphs_in(directory: Path) -> list[Path]:
    """The ONNX files in `directory`, or else in its folder onnx/."""
    direct = sorted(directory.glob("*.onnx"))
    return direct or sorted((directory / GRAPHS_FOLDER).glob("*.onnx"))


def adapter_beside(directory: Path) -> bool:
    """Whether `directory` has a PEFT adapter, beside a base model or alone."""
    return (directory / ADAPTER_CONFIG_NAME).is_file()


def refuse_adapter(directory: Path) -> None:
    """Raise ModelError if `directory` is an adapter and not a model."""
    complete = (directory / MODEL_CONFIG_NAME).is_file() and has_weights(directory)
    if not adapter_beside(directory) or complete:
        return
    base = read_json(directory / ADAPTER_CONFIG_NAME, error=ModelError).get(
        "base_model_name_or_path"
    )
    named = f" ({base})" if isinstance(base, str) and base else ""
    raise ModelError(
        f"{directory} is an adapter: give its base as the model{named}, and this as an adapter"
    )


def stray_weights(directory: Path) -> str | None:
    """Weights in `directory` that are ignored, for a warning; None if there are none."""
    both = all((directory / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    if not both or _named(directory) is not None:
        return None
    return f"{INDEX_NAME} and its shards, because {SINGLE_NAME} comes first, as in transformers"


def peft_parts(names: Collection[str]) -> list[str]:
    """The `names`, of modules or tensors, that belong to PEFT's own modules."""
    return sorted(name for name in names if _PEFT_PART.search(name))


def check_no_peft_layers(directory: Path, names: Collection[str]) -> None:
    """Raise ModelError if `names`, of tensors or modules, belong to a model wrapped by PEFT."""
    if parts := peft_parts(names):
        raise ModelError(
            f"{directory} has a model that was saved with PEFT's layers in it ({parts[0]}"
            f"{f' and {len(parts) - 1} more' if len(parts) > 1 else ''}): save the result of"
            " merge_and_unload(), or the base and the adapter separately"
        )


def _named(directory: Path) -> Path | None:
    """The weight file that config.json names, if any."""
    file = directory / MODEL_CONFIG_NAME
    config: Mapping[str, Any] = (
        read_json(file, error=ModelError, finite=False) if file.is_file() else {}
    )
    name = config.get(_NAMED)
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", _INDEX_ENDING)):
        raise ModelError(f"{file}: {_NAMED} is {name!r}, expected the name of a .safetensors file")
    found = _within(directory, name, file)
    if not found.is_file():
        raise ModelError(f"{file}: {_NAMED} is {name!r}, and {directory} has no such file")
    return found


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index, error=ModelError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map: it is not the index of a checkpoint")
    names = sorted({str(name) for name in weight_map.values()})
    files = [_within(index.parent, name, index) for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if not file.is_file()]
    if missing:
        raise ModelError(
            f"{index} names {missing[0]}, which does not exist"
            f"{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}: the checkpoint is"
            " not complete, fetch or copy it again"
        )
    return tuple(files)


def _within(directory: Path, name: str, source: Path) -> Path:
    # Links are not resolved: a snapshot from the hub consists of links to another folder.
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ModelError(
            f"{source} names {name!r}, which is outside {directory}: only files inside it are read"
        )
    return directory / name


def _no_weights(directory: Path) -> str:
    others = sorted(
        file.name for file in directory.glob("*.safetensors") if not file.match(_ADAPTERS)
    )
    if others:
        return (
            f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}, and transformers does not"
            f" load {others[0]} by default: name it in config.json as transformers_weights, or"
            " save the model with save_pretrained"
        )
    pickles = sorted(file.name for kind in _PICKLES for file in directory.glob(kind))
    if pickles:
        return (
            f"{directory} has no .safetensors file but {pickles[0]}, a pickle, which can run code"
            " when it is loaded: if you trust it, load it with transformers and save it with"
            " save_pretrained"
        )
    return f"{directory} has neither .safetensors nor .onnx files: save the model with transformers"
