"""Adapters on disk: PEFT adapter directories, both ways.

    DIR/adapter_config.json         `AdapterConfig`
    DIR/adapter_model.safetensors   base_model.model.<key>, where <key> is

    <module>.lora_A.weight            [rank, in]           a linear layer
    <module>.lora_B.weight            [out, rank]
    <module>.lora_A.weight            [rank, in, kh, kw]   a convolution
    <module>.lora_B.weight            [out, rank / groups, 1, 1]
    <module>.lora_embedding_A         [rank, vocabulary]   an embedding
    <module>.lora_embedding_B         [size, rank]
    <module>.lora_magnitude_vector    [out]                DoRA; of a convolution [1, out, 1, 1]
    <module>.base_layer.bias          [out]                a target's trained bias
    <parameter>                                            other trained biases, modules_to_save

What PEFT has no field for (the base model's digest, a classifier's labels) is in the metadata of
the safetensors file, which PEFT ignores.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.adapter import Adapter, Factors, Kind
from loradeploy.adapter.config import CONFIG_NAME, AdapterConfig
from loradeploy.adapter.formats import other_config, other_directory, other_file, other_tensors
from loradeploy.adapter.targets import is_saved, is_trained_bias
from loradeploy.adapter.tensors import read_arrays, write_arrays
from loradeploy.errors import AdapterError, listed
from loradeploy.files import read_json, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

WEIGHTS_NAME: Final = "adapter_model.safetensors"
# What training and conversion write into an adapter's directory, and replace there.
OWN_FILES: Final = frozenset(
    {CONFIG_NAME, WEIGHTS_NAME, "README.md", "loss.csv", "loss.png", "train.yaml"}
    | {"modules.json", "1_Pooling/config.json"}  # of an embedder
)
_PREFIX: Final = "base_model.model."
_BASE_DIGEST: Final = "loradeploy.base_digest"
_LABELS: Final = "loradeploy.labels"
_PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# A tensor of the factors by its key: the module, and which part it is.
_FACTOR: Final = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector)"
)
_MAGNITUDE: Final = "lora_magnitude_vector"
_PARTS: Final[Mapping[Kind, tuple[str, str]]] = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
    "conv2d": ("lora_A.weight", "lora_B.weight"),
}
_INNER: Final = ".base_layer."

# What PEFT writes besides and nothing needs: copies of the base's weight below an adapted embedding
# or head, the bias that a module trained whole had before, and a second copy of its new one.
_COPY: Final = re.compile(r".+\.(?:base_layer\.weight|original_module\.bias|modules_to_save\.bias)")

# Tensors that are refused, by the ending of their keys, and what they belong to.
_REFUSED: Final = {
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
    config = _read_config(weights)
    arrays, metadata = read_arrays(weights, error=AdapterError)
    try:
        _check_not_empty(arrays)
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


def _read_config(weights: Path) -> AdapterConfig:
    """What lies beside `weights`, or the error that tells whose adapter they are instead."""
    file = weights.parent / CONFIG_NAME
    if not file.exists() and (told := other_file(weights)) is not None:
        raise AdapterError(f"{file} does not exist: {weights.name} {told}")
    values = read_json(file, error=AdapterError)
    if (told := other_config(values)) is not None:
        raise AdapterError(f"{weights.parent} {told}")
    try:
        return AdapterConfig.from_peft(values)
    except AdapterError as problem:
        raise AdapterError(f"{weights.parent}: {problem}") from None


def _check_not_empty(arrays: Mapping[str, NDArray[Any]]) -> None:
    if any(values.size == 0 for values in arrays.values()):
        told = other_tensors({key: values.shape for key, values in arrays.items()})
        raise AdapterError(f"the file {told}")


def own_files(directory: Path) -> frozenset[str]:
    """The files that a new adapter replaces in `directory`, where another one is already."""
    return OWN_FILES


def save_adapter(adapter: Adapter, directory: str | os.PathLike[str]) -> str:
    """Write `adapter` as a PEFT directory and return its digest.

    Each file is written atomically, the weights last; the same adapter gives the same bytes.
    """
    arrays = {_PREFIX + _key(name, adapter): values for name, values in adapter.saved.items()}
    for module, pair in adapter.factors.items():
        for part, values in _parts(pair).items():
            arrays[f"{_PREFIX}{module}.{part}"] = values
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


def adapter_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The config and the weights of the adapter at `path`, which are the files that PEFT reads.

    Raises:
        AdapterError: as `load_adapter`, for what is not there.
    """
    weights = _weights_file(Path(path))
    return weights.parent / CONFIG_NAME, weights


def copy_adapter(path: str | os.PathLike[str], directory: str | os.PathLike[str]) -> None:
    """Copy the two files of the adapter at `path` into `directory`, byte by byte."""
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    for file, name in zip(adapter_files(path), (CONFIG_NAME, WEIGHTS_NAME), strict=True):
        shutil.copyfile(file, place / name)


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
        if not (place / WEIGHTS_NAME).exists():
            if (told := other_directory(place)) is not None:
                raise AdapterError(f"{place} {told}")
            if not (place / CONFIG_NAME).exists():
                raise AdapterError(
                    f"{place} is no adapter: it holds neither {CONFIG_NAME} nor {WEIGHTS_NAME}"
                )
        return place / WEIGHTS_NAME
    if not place.exists():
        raise AdapterError(f"{place} does not exist: give a PEFT adapter directory")
    if place.suffix != ".safetensors":
        if (told := other_file(place)) is not None:
            raise AdapterError(f"{place} {told}")
        raise AdapterError(f"{place} is no adapter: give a PEFT directory or its .safetensors file")
    return place


def _sort(
    arrays: Mapping[str, NDArray[Any]], config: AdapterConfig
) -> tuple[dict[str, Factors], dict[str, NDArray[Any]]]:
    """The tensors of the file by what they are; every misfit is named in one error."""
    parts: dict[str, dict[str, NDArray[Any]]] = {}
    others: dict[str, NDArray[Any]] = {}
    problems: list[str] = []
    for key, values in sorted(arrays.items()):
        name = key.removeprefix(_PREFIX)
        factor = _FACTOR.fullmatch(name)
        refused = next((what for ending, what in _REFUSED.items() if name.endswith(ending)), None)
        if name == key:
            problems.append(f"{key} does not begin with {_PREFIX!r}")
        elif values.dtype.kind != "f":
            problems.append(f"{key} is {values.dtype}, not floating point")
        elif factor:
            parts.setdefault(factor["module"], {})[factor["part"]] = values
        elif refused:
            problems.append(f"{key} belongs to {refused}, which is not supported")
        else:
            others[name] = values
    factors: dict[str, Factors] = {}
    for module, there in parts.items():
        found = _factors(there)
        if isinstance(found, str):
            problems.append(f"{module} {found}")
        else:
            factors[module] = found
    saved: dict[str, NDArray[Any]] = {}
    for name, values in others.items():
        inner = name.replace(_INNER, ".")
        if _COPY.fullmatch(name) and _is_copy(name, parts, config):
            continue
        if is_saved(inner, config) or is_trained_bias(inner, parts, config):
            saved[inner] = values
        else:
            problems.append(
                f"{_PREFIX}{name} is neither a factor, nor of modules_to_save, nor a trained bias"
                " (an embedding: save with save_embedding_layers=False)"
            )
    if problems:
        told = other_tensors({key: values.shape for key, values in arrays.items()})
        raise AdapterError(
            f"the file {told}" if told else f"tensors are refused: {listed(problems)}"
        )
    return factors, saved


def _parts(pair: Factors) -> dict[str, NDArray[Any]]:
    """The tensors of `pair` as PEFT names and shapes them."""
    half_A, half_B = _PARTS[pair.kind]
    parts = {half_A: pair.A, half_B: pair.B}
    if pair.magnitude is not None:
        convolution = pair.kind == "conv2d"
        parts[_MAGNITUDE] = pair.magnitude.reshape(1, -1, 1, 1) if convolution else pair.magnitude
    return parts


def _factors(parts: Mapping[str, NDArray[Any]]) -> Factors | str:
    """The factors that one module's tensors are, or what is wrong with them."""
    kind: Kind = "embedding" if any("embedding" in part for part in parts) else "linear"
    if kind == "linear" and any(v.ndim > 2 for p, v in parts.items() if p != _MAGNITUDE):
        kind = "conv2d"
    half_A, half_B = _PARTS[kind]
    if missing := [half for half in (half_A, half_B) if half not in parts]:
        there = next((part for part in parts if part != _MAGNITUDE), _MAGNITUDE)
        return f"has {_short(there)} but no {_short(missing[0])}"
    if too_much := [part for part in parts if part not in (half_A, half_B, _MAGNITUDE)]:
        return f"has {_short(half_A)} and {_short(too_much[0])} too"
    magnitude = parts.get(_MAGNITUDE)
    if magnitude is not None:
        magnitude = magnitude.reshape(-1)
    return Factors(A=parts[half_A], B=parts[half_B], magnitude=magnitude, kind=kind)


def _short(part: str) -> str:
    return part.removesuffix(".weight")


def _key(parameter: str, adapter: Adapter) -> str:
    # PEFT wraps the targets, so that their biases are one step further down.
    module, _, last = parameter.rpartition(".")
    wrapped = module in adapter.factors and not is_saved(parameter, adapter.config)
    return f"{module}{_INNER}{last}" if wrapped else parameter


def _is_copy(name: str, targets: Iterable[str], config: AdapterConfig) -> bool:
    if name.endswith(f"{_INNER}weight"):
        return name.removesuffix(f"{_INNER}weight") in targets
    return config.bias == "all" and is_saved(name, config)


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
