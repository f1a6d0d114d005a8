"""Adapters on disk: PEFT adapter directories, both ways.

    DIR/adapter_config.json         `AdapterConfig`
    DIR/adapter_model.safetensors   base_model.model.<module>.lora_A.weight   [rank, in]
                                    base_model.model.<module>.lora_B.weight   [out, rank]
                                    base_model.model.<parameter>              modules_to_save

What PEFT has no field for (the base model's digest, a classifier's labels) is in the metadata of
the safetensors file, which PEFT ignores.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import CONFIG_NAME, AdapterConfig
from loradeploy.adapter.tensors import read_arrays, write_arrays
from loradeploy.errors import AdapterError
from loradeploy.files import read_json, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

WEIGHTS_NAME: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_BASE_DIGEST: Final = "loradeploy.base_digest"
_LABELS: Final = "loradeploy.labels"
_PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# Tensors of LoRA variants, by the ending of their keys, and what they belong to.
_VARIANTS: Final = {
    ".lora_magnitude_vector": "DoRA",
    ".lora_magnitude_vector.weight": "DoRA",
    ".lora_embedding_A": "LoRA on an embedding",
    ".lora_embedding_B": "LoRA on an embedding",
    ".lora_A.bias": "a trained LoRA bias",
    ".lora_B.bias": "a trained LoRA bias",
}


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The adapter in a PEFT directory, or in a .safetensors file with its config beside it.

    Raises:
        AdapterError: missing files, a pickle, a broken header, values that are not finite, tensors
            without their other half, tensors of the base model, or a config that is refused.
    """
    place = Path(path)
    weights = _weights_file(place)
    config = AdapterConfig.from_peft(read_json(weights.parent / CONFIG_NAME, error=AdapterError))
    arrays, metadata = read_arrays(weights, error=AdapterError)
    try:
        factors, saved = _sort(arrays, config)
        return Adapter(
            config=config,
            factors=factors,
            saved=saved,
            base_digest=metadata.get(_BASE_DIGEST),
            labels=_labels(metadata),
        )
    except AdapterError as problem:
        raise AdapterError(f"{weights}: {problem}") from None


def save_adapter(adapter: Adapter, directory: str | os.PathLike[str]) -> str:
    """Write `adapter` as a PEFT directory and return its digest.

    Each file is written atomically, the weights last; the same adapter gives the same bytes.
    """
    arrays = {f"{_PREFIX}{name}": values for name, values in adapter.saved.items()}
    for module, pair in adapter.factors.items():
        arrays[f"{_PREFIX}{module}.lora_A.weight"] = pair.A
        arrays[f"{_PREFIX}{module}.lora_B.weight"] = pair.B
    metadata = {"format": "pt"}
    if adapter.base_digest is not None:
        metadata[_BASE_DIGEST] = adapter.base_digest
    if adapter.labels is not None:
        metadata[_LABELS] = json.dumps(adapter.labels, ensure_ascii=False)
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / CONFIG_NAME, adapter.config.to_peft())
    write_arrays(place / WEIGHTS_NAME, arrays, metadata)
    return adapter.digest


def _weights_file(place: Path) -> Path:
    if place.suffix in _PICKLES or (place.is_dir() and not (place / WEIGHTS_NAME).exists()):
        pickles = [place] if place.is_file() else sorted(place.glob("adapter_model.*"))
        for file in pickles:
            if file.suffix in _PICKLES:
                raise AdapterError(
                    f"{file} is a pickle, which runs code when it is read, and is refused. If you"
                    ' trust it, convert it: python -c "import torch, safetensors.torch as s; s.'
                    f"save_file(torch.load('{file.name}', weights_only=True), '{WEIGHTS_NAME}')\""
                )
    if place.is_dir():
        if not (place / CONFIG_NAME).exists() and not (place / WEIGHTS_NAME).exists():
            raise AdapterError(
                f"{place} is no adapter: it holds neither {CONFIG_NAME} nor {WEIGHTS_NAME}"
            )
        return place / WEIGHTS_NAME
    if not place.exists():
        raise AdapterError(f"{place} does not exist: give a PEFT adapter directory")
    if place.suffix != ".safetensors":
        raise AdapterError(f"{place} is no adapter: give a PEFT directory or its .safetensors file")
    return place


def _sort(
    arrays: Mapping[str, NDArray[Any]], config: AdapterConfig
) -> tuple[dict[str, Factors], dict[str, NDArray[Any]]]:
    """The tensors of the file by what they are; every misfit is named in one error."""
    halves: dict[str, dict[str, NDArray[Any]]] = {}
    saved: dict[str, NDArray[Any]] = {}
    problems: list[str] = []
    for key, values in sorted(arrays.items()):
        name = key.removeprefix(_PREFIX)
        factor = re.fullmatch(r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight", name)
        variant = next((v for ending, v in _VARIANTS.items() if name.endswith(ending)), None)
        if name == key:
            problems.append(f"{key} does not begin with {_PREFIX!r}")
        elif values.dtype.kind != "f":
            problems.append(f"{key} is {values.dtype}, not floating point")
        elif factor:
            halves.setdefault(factor["module"], {})[factor["half"]] = values
        elif variant:
            problems.append(f"{key} belongs to {variant}, which is not supported")
        elif _is_saved(name, config):
            saved[name] = values
        else:
            problems.append(
                f"{key} is neither a factor nor of a module in modules_to_save (PEFT copies the"
                " base's embeddings unless save_pretrained is told save_embedding_layers=False)"
            )
    for module, pair in halves.items():
        if len(pair) == 1:
            there, missing = ("A", "B") if "A" in pair else ("B", "A")
            problems.append(f"{module} has lora_{there} but no lora_{missing}")
    if problems:
        raise AdapterError("the tensors are refused: " + "; ".join(problems))
    return {module: Factors(A=pair["A"], B=pair["B"]) for module, pair in halves.items()}, saved


def _is_saved(parameter: str, config: AdapterConfig) -> bool:
    # PEFT saves every module whose name ends in a listed one, with all that is inside it.
    *modules, _ = parameter.split(".")
    return any(
        ".".join(modules[: depth + 1]).endswith(name)
        for depth in range(len(modules))
        for name in config.modules_to_save
    )


def _labels(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    if _LABELS not in metadata:
        return None
    try:
        labels = json.loads(metadata[_LABELS])
    except ValueError:
        labels = None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise AdapterError(f"the metadata {_LABELS} is not a JSON list of names")
    return tuple(labels)
