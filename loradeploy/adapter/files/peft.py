"""Read and write adapters as PEFT adapter directories.

    DIR/adapter_config.json         `AdapterConfig`
    DIR/adapter_model.safetensors   base_model.model.<key>, where <key> is

    <module>.lora_A.weight            [rank, in]           a linear layer
    <module>.lora_B.weight            [out, rank]
    <module>.lora_A.weight            [rank, in, kh, kw]   a convolution
    <module>.lora_B.weight            [out, rank / groups, 1, 1]
    <module>.lora_embedding_A         [rank, vocabulary]   an embedding
    <module>.lora_embedding_B         [size, rank]
    (adapter/algebra/experts.py)           experts of a mixture
    <module>.lora_magnitude_vector    [out]                DoRA; of a convolution [1, out, 1, 1]
    <module>.lora_B.bias              [out]                lora_bias
    <module>.base_layer.bias          [out]                a target's trained bias
    <parameter>                                            other trained biases, modules_to_save
    <module>.base_layer.weight, …     a weight of the base that PEFT saves for embeddings
    <module>.token_adapter.trainable_tokens_delta [tokens, size]   rows of a weight

`adapter.files.keys` parses other forms of keys. Data for which PEFT has no field (the digest of the
base model, the digest of the complete adapter if this is a part of one, the labels and the problem
type of a classifier) is in the metadata of the safetensors file, which PEFT ignores.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.algebra.experts import peft_tensors
from loradeploy.adapter.config import PARAMETERS, AdapterConfig
from loradeploy.adapter.files.formats import (
    misordered_export,
    other_config,
    other_directory,
    other_file,
    other_tensors,
    trained_beside,
)
from loradeploy.adapter.files.keys import INNER, MAGNITUDE, ORIGINAL, PREFIX, TRAINED_ROWS
from loradeploy.adapter.files.methods import METHODS, as_lora
from loradeploy.adapter.files.roles import BIAS, PARTS, tensors_by_role
from loradeploy.adapter.files.tensors import read_arrays, write_tensors
from loradeploy.adapter.heads import LABELS_KEY, PROBLEM_KEY, head_beside, label_count
from loradeploy.adapter.modules.targets import is_saved
from loradeploy.adapter.tasks import SEQUENCE_CLASSIFICATION, task_of_peft
from loradeploy.disk import explained
from loradeploy.errors import AdapterError
from loradeploy.files import copy_file, json_text, read_json
from loradeploy.names import ADAPTER_CONFIG_NAME, MODULES_NAME
from loradeploy.paths import takes_paths
from loradeploy.snapshot import Snapshot, of_one_version
from loradeploy.writing import atomic_pair, wait_for_pair

if TYPE_CHECKING:
    from numpy.typing import NDArray

WEIGHTS_NAME: Final = "adapter_model.safetensors"
# Files that training and conversion write into an adapter's directory, and may replace.
OWN_FILES: Final = frozenset(
    {ADAPTER_CONFIG_NAME, WEIGHTS_NAME, "README.md", "loss.csv", "loss.png", "train.yaml"}
    | {MODULES_NAME, "1_Pooling/config.json"}  # of an embedder
)
_BASE_DIGEST: Final = "loradeploy.base_digest"
_PART_OF: Final = "loradeploy.part_of"
_PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@takes_paths("path")
def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The adapter in a PEFT directory, or in a .safetensors file with its config beside it.

    Raises:
        AdapterError: missing files, a pickle, an invalid header, a value that is not finite, a
            factor without its counterpart, tensors of the base model, or a refused config; files
            that changed during each of several attempts.
    """
    place = Path(path)
    weights = place / WEIGHTS_NAME if place.is_dir() else place
    names = (weights.name, ADAPTER_CONFIG_NAME)

    def read() -> Adapter:
        if not weights.exists():
            wait_for_pair(weights)  # `save_adapter` may be replacing it
        return _load(_weights_file(place))

    return of_one_version(weights, lambda: Snapshot.of(weights.parent, names), read, AdapterError)


def _load(weights: Path) -> Adapter:
    values, config = _read_config(weights)
    arrays: Mapping[str, NDArray[Any]]
    arrays, metadata = read_arrays(weights, error=AdapterError)
    found = misordered_export(weights.parent, values, arrays) or trained_beside(weights.parent)
    if found is not None:
        raise AdapterError(f"{weights.parent} {found}")
    try:
        if config is None:
            config, arrays = as_lora(values, arrays)
        _check_not_empty(arrays)
        config, tensors = tensors_by_role(arrays, config)
        adapter = Adapter(config=config, **tensors, base_digest=metadata.get(_BASE_DIGEST))
        task = task_of_peft(config.task_type)
        head = head_beside(
            weights.parent,
            metadata,
            label_count(adapter),
            sequences=task is None or task.name == SEQUENCE_CLASSIFICATION,
        )
        return dataclasses.replace(
            adapter,
            labels=head.labels,
            problem_type=head.problem_type,
            base_class=_base_class(values),
            part_of=metadata.get(_PART_OF),
        )
    except AdapterError as problem:
        raise AdapterError(f"{weights}: {problem}") from None


def _read_config(weights: Path) -> tuple[Mapping[str, Any], AdapterConfig | None]:
    """The config beside `weights`, as read and parsed; parsed later for methods other than LoRA.

    For an adapter of another library, the error names that library.
    """
    file = weights.parent / ADAPTER_CONFIG_NAME
    if not file.exists() and (found := other_file(weights)) is not None:
        raise AdapterError(f"{file} does not exist: {weights.name} {found}")
    values = read_json(file, error=AdapterError)
    if (found := other_config(values)) is not None:
        raise AdapterError(f"{weights.parent} {found}")
    try:
        other = str(values.get("peft_type")) in METHODS
        return values, None if other else AdapterConfig.from_peft(values)
    except AdapterError as problem:
        raise AdapterError(f"{weights.parent}: {problem}") from None


def _base_class(config: Mapping[str, Any]) -> str | None:
    """The class of the wrapped model, which PEFT writes if there is no task_type."""
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    return name if isinstance(name, str) else None


def _check_not_empty(arrays: Mapping[str, NDArray[Any]]) -> None:
    if any(values.size == 0 for values in arrays.values()):
        found = other_tensors({key: values.shape for key, values in arrays.items()})
        raise AdapterError(f"the file {found}")


def own_files(directory: Path) -> frozenset[str]:
    """The files in `directory` that a new adapter may replace."""
    return OWN_FILES


@takes_paths("directory")
def save_adapter(adapter: Adapter, directory: str | os.PathLike[str]) -> str:
    """Write `adapter` as a PEFT directory and return its digest.

    A kill leaves the old adapter, the new one, or one without weights, which is refused. Equal
    adapters give equal bytes.

    Raises:
        OutputError: it cannot be written. An existing adapter is unchanged.
    """
    arrays = {PREFIX + _key(name, adapter): values for name, values in adapter.saved.items()}
    arrays |= {PREFIX + _carried_key(n, adapter): v for n, v in adapter.carried.items()}
    for module, pair in adapter.factors.items():
        for part, values in _parts(pair).items() if pair.kind != "experts" else ():
            arrays[f"{PREFIX}{module}.{part}"] = values
    arrays |= {PREFIX + key: values for key, values in peft_tensors(adapter.factors).items()}
    for parameter, rows in adapter.rows.items():
        arrays[f"{PREFIX}{parameter.removesuffix('.weight')}{TRAINED_ROWS}"] = rows.values
    metadata = {"format": "pt"}
    if adapter.base_digest is not None:
        metadata[_BASE_DIGEST] = adapter.base_digest
    if adapter.part_of is not None:
        metadata[_PART_OF] = adapter.part_of
    if adapter.labels is not None:
        metadata[LABELS_KEY] = json.dumps(adapter.labels, ensure_ascii=False)
    if adapter.problem_type is not None:
        metadata[PROBLEM_KEY] = adapter.problem_type
    target = Path(directory)
    with explained(target):
        target.mkdir(parents=True, exist_ok=True)
    # An old config would scale new weights wrongly.
    with atomic_pair(target / ADAPTER_CONFIG_NAME, target / WEIGHTS_NAME) as (config, weights):
        write_tensors(weights, arrays, metadata)
        config.write_text(json_text(adapter.config.to_peft()), encoding="utf-8")
    return adapter.digest


def adapter_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The paths of the config and the weights of the adapter at `path`.

    Raises:
        AdapterError: as `load_adapter`, for missing files.
    """
    weights = _weights_file(Path(path))
    return weights.parent / ADAPTER_CONFIG_NAME, weights


def names_targets(path: str | os.PathLike[str]) -> bool:
    """Whether the config of the adapter at `path` names targets; PEFT chooses others if not."""
    config = read_json(adapter_files(path)[0], error=AdapterError)
    return any(config.get(name) for name in ("target_modules", PARAMETERS))


def copy_adapter(path: str | os.PathLike[str], directory: str | os.PathLike[str]) -> None:
    """Copy the config and the weights of the adapter at `path` into `directory`."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    for file, name in zip(adapter_files(path), (ADAPTER_CONFIG_NAME, WEIGHTS_NAME), strict=True):
        copy_file(file, target / name, error=AdapterError)


def _weights_file(path: Path) -> Path:
    if path.suffix in _PICKLES or (path.is_dir() and not (path / WEIGHTS_NAME).exists()):
        refuse_pickles(path, "adapter_model.*")
    if path.is_dir():
        if not (path / WEIGHTS_NAME).exists():
            if (found := other_directory(path)) is not None:
                raise AdapterError(f"{path} {found}")
            if not (path / ADAPTER_CONFIG_NAME).exists():
                raise AdapterError(
                    f"{path} is not an adapter: it has neither {ADAPTER_CONFIG_NAME} nor"
                    f" {WEIGHTS_NAME}"
                )
            refuse_pickles(path, "*model*")  # not those of a training's state
            raise AdapterError(
                f"{path} has {ADAPTER_CONFIG_NAME}, but {WEIGHTS_NAME} does not exist"
            )
        return path / WEIGHTS_NAME
    if not path.exists():
        raise AdapterError(f"{path} does not exist: give a PEFT adapter directory")
    if path.suffix != ".safetensors":
        if (found := other_file(path)) is not None:
            raise AdapterError(f"{path} {found}")
        raise AdapterError(
            f"{path} is not an adapter: give a PEFT directory or its .safetensors file"
        )
    return path


def refuse_pickles(path: Path, names: str = "*adapter*") -> None:
    """Raise AdapterError, with the conversion to run, for a pickle: `path`, or `names` in it."""
    for file in [path] if path.is_file() else sorted(path.glob(names)):
        if file.suffix in _PICKLES:
            raise AdapterError(
                f"{file} is a pickle, which can run code when it is loaded, and is refused. If"
                ' you trust it, convert it: python -c "import torch, safetensors.torch as s; s.'
                f"save_file(torch.load('{file.name}', weights_only=True), '{WEIGHTS_NAME}')\""
            )


def _parts(pair: Factors) -> dict[str, NDArray[Any]]:
    """The tensors of `pair` with the names and shapes of PEFT."""
    half_A, half_B = PARTS[pair.kind]
    parts = {half_A: pair.A, half_B: pair.B}
    if pair.magnitude is not None:
        convolution = pair.kind == "conv2d"
        parts[MAGNITUDE] = pair.magnitude.reshape(1, -1, 1, 1) if convolution else pair.magnitude
    if pair.bias is not None:
        parts[BIAS] = pair.bias
    return parts


def _key(parameter: str, adapter: Adapter) -> str:
    # PEFT wraps target modules, so their biases are below base_layer.
    module, _, last = parameter.rpartition(".")
    wrapped = module in adapter.factors and not is_saved(parameter, adapter.config)
    return f"{module}{INNER}{last}" if wrapped else parameter


def _carried_key(parameter: str, adapter: Adapter) -> str:
    module, _, last = parameter.rpartition(".")
    if module in adapter.factors:
        return f"{module}{INNER}{last}"
    return f"{module}{ORIGINAL}{last}" if parameter in adapter.saved else parameter
