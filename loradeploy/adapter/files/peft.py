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
    <module>.base_layer.bias          [out]                a target's trained bias
    <parameter>                                            other trained biases, modules_to_save
    <module>.base_layer.weight, …     a weight of the base, which PEFT saves for embeddings
    <module>.token_adapter.trainable_tokens_delta [tokens, size]   rows of a weight

`adapter.files.keys` parses other forms of keys. Data without a field in PEFT (the digest of the
base model, that of the adapter of which this is a part, the labels and the problem type of a
classifier) is in the metadata of the safetensors file, which PEFT ignores.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors, Kind, Rows
from loradeploy.adapter.algebra.experts import (
    expert_factors,
    parameters_below,
    peft_tensors,
    with_targets,
)
from loradeploy.adapter.config import CONFIG_NAME, TYING, AdapterConfig
from loradeploy.adapter.files.formats import (
    misordered_export,
    other_config,
    other_directory,
    other_file,
    other_tensors,
)
from loradeploy.adapter.files.keys import PREFIX, Key, read_keys
from loradeploy.adapter.files.tensors import read_arrays, write_arrays
from loradeploy.adapter.heads import LABELS_KEY, PROBLEM_KEY, head_beside, label_count
from loradeploy.adapter.modules.targets import is_saved, is_trained_bias, saved_by, untargeted
from loradeploy.adapter.tasks import SEQUENCE_CLASSIFICATION, task_of_peft
from loradeploy.errors import AdapterError, listed, listed_names, shown
from loradeploy.files import copy_file, read_json, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

WEIGHTS_NAME: Final = "adapter_model.safetensors"
# Files that training and conversion write into an adapter's directory, and may replace.
OWN_FILES: Final = frozenset(
    {CONFIG_NAME, WEIGHTS_NAME, "README.md", "loss.csv", "loss.png", "train.yaml"}
    | {"modules.json", "1_Pooling/config.json"}  # of an embedder
)
_BASE_DIGEST: Final = "loradeploy.base_digest"
_PART_OF: Final = "loradeploy.part_of"
_PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

_MAGNITUDE: Final = "lora_magnitude_vector"
_PARTS: Final[Mapping[Kind, tuple[str, str]]] = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
    "conv2d": ("lora_A.weight", "lora_B.weight"),
    "experts": ("lora_A.weight", "lora_B.weight"),
}
_INNER: Final = ".base_layer."
_ORIGINAL: Final = ".original_module."
_ROWS: Final = ".token_adapter.trainable_tokens_delta"


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """The adapter in a PEFT directory, or in a .safetensors file with its config beside it.

    Raises:
        AdapterError: missing files, a pickle, a broken header, values that are not finite, a factor
            without its counterpart, tensors of the base model, or a config that is refused.
    """
    source = Path(path)
    weights = _weights_file(source)
    values, config = _read_config(weights)
    arrays, metadata = read_arrays(weights, error=AdapterError)
    if (found := misordered_export(weights.parent, values, arrays)) is not None:
        raise AdapterError(f"{weights.parent} {found}")
    try:
        _check_not_empty(arrays)
        config, tensors = _sort(arrays, config)
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


def _read_config(weights: Path) -> tuple[Mapping[str, Any], AdapterConfig]:
    """The config beside `weights`, as read and parsed.

    The error names the library of another format's adapter.
    """
    file = weights.parent / CONFIG_NAME
    if not file.exists() and (found := other_file(weights)) is not None:
        raise AdapterError(f"{file} does not exist: {weights.name} {found}")
    values = read_json(file, error=AdapterError)
    if (found := other_config(values)) is not None:
        raise AdapterError(f"{weights.parent} {found}")
    try:
        return values, AdapterConfig.from_peft(values)
    except AdapterError as problem:
        raise AdapterError(f"{weights.parent}: {problem}") from None


def _base_class(config: Mapping[str, Any]) -> str | None:
    """The class of the model that was wrapped, which PEFT writes where no task_type says it."""
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    return name if isinstance(name, str) else None


def _tied(factors: Mapping[str, Factors], config: AdapterConfig) -> set[str]:
    """The layers whose factors are those of an embedding, transposed: `ensure_weight_tying`.

    PEFT takes them out of `target_modules`, and adapts them all the same.
    """
    if not config.extra.get(TYING):
        return set()
    embeddings = [pair for pair in factors.values() if pair.kind == "embedding"]
    return {
        module
        for module, pair in factors.items()
        if pair.kind == "linear"
        and any(np.array_equal(pair.A, e.B.T) and np.array_equal(pair.B, e.A.T) for e in embeddings)
    }


def _untied(config: AdapterConfig, factors: Mapping[str, Factors]) -> AdapterConfig:
    """`config` with the modules of `factors` as targets, each with its own.

    Whatever left a tied one out of the targets is left out itself.
    """
    extra = {name: value for name, value in config.extra.items() if name != TYING}
    return with_targets(dataclasses.replace(config, extra=extra), factors)


def _check_not_empty(arrays: Mapping[str, NDArray[Any]]) -> None:
    if any(values.size == 0 for values in arrays.values()):
        found = other_tensors({key: values.shape for key, values in arrays.items()})
        raise AdapterError(f"the file {found}")


def own_files(directory: Path) -> frozenset[str]:
    """The files in `directory` that a new adapter may replace."""
    return OWN_FILES


def save_adapter(adapter: Adapter, directory: str | os.PathLike[str]) -> str:
    """Write `adapter` as a PEFT directory and return its digest.

    Each file is written atomically, the weights last. Equal adapters give equal bytes.
    """
    arrays = {PREFIX + _key(name, adapter): values for name, values in adapter.saved.items()}
    arrays |= {PREFIX + _carried_key(n, adapter): v for n, v in adapter.carried.items()}
    for module, pair in adapter.factors.items():
        for part, values in _parts(pair).items() if pair.kind != "experts" else ():
            arrays[f"{PREFIX}{module}.{part}"] = values
    arrays |= {PREFIX + key: values for key, values in peft_tensors(adapter.factors).items()}
    for parameter, rows in adapter.rows.items():
        arrays[f"{PREFIX}{parameter.removesuffix('.weight')}{_ROWS}"] = rows.values
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
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / CONFIG_NAME, adapter.config.to_peft())
    write_arrays(target / WEIGHTS_NAME, arrays, metadata)
    return adapter.digest


def adapter_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The paths of the config and the weights of the adapter at `path`.

    Raises:
        AdapterError: as `load_adapter`, for missing files.
    """
    weights = _weights_file(Path(path))
    return weights.parent / CONFIG_NAME, weights


def copy_adapter(path: str | os.PathLike[str], directory: str | os.PathLike[str]) -> None:
    """Copy the config and the weights of the adapter at `path` into `directory`."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    for file, name in zip(adapter_files(path), (CONFIG_NAME, WEIGHTS_NAME), strict=True):
        copy_file(file, target / name, error=AdapterError)


def _weights_file(path: Path) -> Path:
    if path.suffix in _PICKLES or (path.is_dir() and not (path / WEIGHTS_NAME).exists()):
        refuse_pickles(path, "adapter_model.*")
    if path.is_dir():
        if not (path / WEIGHTS_NAME).exists():
            if (found := other_directory(path)) is not None:
                raise AdapterError(f"{path} {found}")
            if not (path / CONFIG_NAME).exists():
                raise AdapterError(
                    f"{path} is not an adapter: it has neither {CONFIG_NAME} nor {WEIGHTS_NAME}"
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


def adapter_from_arrays(arrays: Mapping[str, NDArray[Any]], config: AdapterConfig) -> Adapter:
    """The adapter that PEFT's tensors `arrays`, by their keys, and `config` are.

    Raises:
        AdapterError: as `load_adapter`, for tensors.
    """
    config, tensors = _sort(arrays, config)
    return Adapter(config=config, **tensors)


def _sort(
    arrays: Mapping[str, NDArray[Any]], config: AdapterConfig
) -> tuple[AdapterConfig, dict[str, Any]]:
    """The tensors of the file by role, and the config with every fully trained module.

    Every tensor is used or refused; one error names all that are refused.
    """
    try:
        keys = read_keys(arrays)
    except AdapterError as problem:
        other = other_tensors({key: values.shape for key, values in arrays.items()})
        if other is None:
            raise
        raise AdapterError(f"the file {other}") from problem
    parts: dict[str, dict[str, NDArray[Any]]] = {}
    others: list[tuple[str, Key, NDArray[Any]]] = []
    problems: list[str] = []
    for key, values in sorted(arrays.items()):
        what = keys[key]
        if values.dtype.kind != "f":
            problems.append(f"{key} is {values.dtype}, not floating point")
        elif what.part == "bias":
            problems.append(f"{key} belongs to a trained LoRA bias, which is not supported")
        elif what.part == "factor":
            half = f"{what.half}.weight" if what.half in ("lora_A", "lora_B") else what.half
            parts.setdefault(what.name, {})[half] = values
        else:
            others.append((key, what, values))
    factors: dict[str, Factors] = {}
    below = parameters_below(parts, config)
    if isinstance(below, str):
        problems.append(below)
        below = {}
    for module, tensors_of_module in parts.items():
        found = _factors(tensors_of_module)
        if module in below and isinstance(found, Factors):
            module = below[module]
            found = expert_factors(found.A, found.B, config.rank_of(module), config)
        if isinstance(found, str):
            problems.append(f"{module} {found}")
        else:
            factors[module] = found
    working = [
        n
        for n, pair in factors.items()
        if pair.kind != "experts" and (pair.magnitude is not None or np.any(pair.B))
    ]
    ignored = untargeted(working, config)
    if tied_factors := _tied(factors, config) & {*ignored}:
        ignored = [module for module in ignored if module not in tied_factors]
        config = _untied(config, factors)
    if ignored:
        problems.append(
            f"{listed_names(ignored, 3)}: the file has factors, and target_modules, exclude_modules"
            " or layers_to_transform in its config leave the module out (PEFT ignores them): remove"
            " them from the file, or correct the config"
        )
    task = task_of_peft(config.task_type)
    heads = task.heads if task is not None and task.trained_head else ()
    saving = dataclasses.replace(config, modules_to_save=(*config.modules_to_save, *heads))
    tied = bool(config.extra.get(TYING)) and bool(config.modules_to_save)
    named = set()
    slots: dict[tuple[str, str], NDArray[Any]] = {}
    for key, what, values in others:
        name = what.name
        in_full = what.part == "saved" or (
            what.part == "parameter"
            and (is_saved(name, saving) or (tied and name.endswith(".weight")))
        )
        if what.part == "rows":
            slot = "rows"
        elif in_full or (what.part != "original" and is_trained_bias(name, parts, config)):
            slot = "saved"
            if in_full and not is_saved(name, config):
                named.add(_saved_as(name, saving))
        elif "lora_" in name or (what.part == "parameter" and name.rpartition(".")[0] in parts):
            problems.append(
                f"{key} is neither a factor, nor of modules_to_save, nor a trained bias (PEFT"
                " ignores it)"
            )
            continue
        else:
            slot = "carried"
        if not np.array_equal(slots.setdefault((slot, name), values), values):
            problems.append(f"{key} differs from what the file has for {name} under another key")
    tensors: dict[str, Any] = {"factors": factors, "saved": {}, "carried": {}, "rows": {}}
    for (slot, name), values in slots.items():
        if slot != "rows":
            tensors[slot][name] = values
            continue
        rows = _rows(name, values, config)
        if isinstance(rows, str):
            problems.append(rows)
        else:
            tensors[slot][f"{name}.weight"] = rows
    if config.extra.get("trainable_token_indices") and not tensors["rows"] and not problems:
        problems.append("trainable_token_indices is set, and the file has no rows of these tokens")
    if not any((factors, tensors["saved"], tensors["rows"])) and others and not problems:
        problems.append(f"{others[0][0]} and all others are not tensors of an adapter")
    if problems:
        other = other_tensors({key: values.shape for key, values in arrays.items()})
        raise AdapterError(
            f"the file {other}" if other else f"tensors are refused: {listed(problems)}"
        )
    # The original bias of a fully trained module is dropped: only weights can be shared.
    tensors["carried"] = {
        name: values
        for name, values in tensors["carried"].items()
        if name not in tensors["saved"] or name.endswith(".weight")
    }
    known = (*config.modules_to_save, *sorted(named.difference(config.modules_to_save)))
    return dataclasses.replace(config, modules_to_save=known), tensors


def _saved_as(parameter: str, saving: AdapterConfig) -> str:
    """The entry of modules_to_save for `parameter`: a head that PEFT knows, or its module."""
    return saved_by(parameter, saving) or parameter.rpartition(".")[0]


def _rows(module: str, values: NDArray[Any], config: AdapterConfig) -> Rows | str:
    """The trained rows of `module`'s weight, or why they are refused."""
    indices = config.extra.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        steps = module.split(".")
        ends = (".".join(steps[first:]) for first in range(len(steps)))  # the longest first
        indices = next((indices[end] for end in ends if end in indices), None)
    if not isinstance(indices, list):
        return f"{module} has trained tokens, but trainable_token_indices does not list them"
    if wrong := [i for i in indices if type(i) is not int or i < 0]:
        return (
            f"trainable_token_indices names {shown(wrong[0])} for {module}, which is not the id of"
            " a token (an integer from 0 on)"
        )
    if len(set(indices)) != len(indices):
        return f"trainable_token_indices names a token of {module} twice"
    if values.ndim != 2 or len(values) != len(indices):
        return (
            f"{module} has trained tokens {list(values.shape)}, trainable_token_indices names"
            f" {len(indices)}"
        )
    return Rows(tuple(indices), values)


def _parts(pair: Factors) -> dict[str, NDArray[Any]]:
    """The tensors of `pair` with the names and shapes of PEFT."""
    half_A, half_B = _PARTS[pair.kind]
    parts = {half_A: pair.A, half_B: pair.B}
    if pair.magnitude is not None:
        convolution = pair.kind == "conv2d"
        parts[_MAGNITUDE] = pair.magnitude.reshape(1, -1, 1, 1) if convolution else pair.magnitude
    return parts


def _factors(parts: Mapping[str, NDArray[Any]]) -> Factors | str:
    """The factors in one module's tensors, or why they are refused."""
    kind: Kind = "embedding" if any("embedding" in part for part in parts) else "linear"
    if kind == "linear" and any(v.ndim > 2 for p, v in parts.items() if p != _MAGNITUDE):
        kind = "conv2d"
    half_A, half_B = _PARTS[kind]
    if missing := [half for half in (half_A, half_B) if half not in parts]:
        present = next((part for part in parts if part != _MAGNITUDE), _MAGNITUDE)
        return f"has {_short(present)} but no {_short(missing[0])}"
    if surplus := [part for part in parts if part not in (half_A, half_B, _MAGNITUDE)]:
        return f"has {_short(half_A)} and {_short(surplus[0])} too"
    magnitude = parts.get(_MAGNITUDE)
    if magnitude is not None:
        magnitude = magnitude.reshape(-1)
    return Factors(A=parts[half_A], B=parts[half_B], magnitude=magnitude, kind=kind)


def _short(part: str) -> str:
    return part.removesuffix(".weight")


def _key(parameter: str, adapter: Adapter) -> str:
    # PEFT wraps target modules, so that their biases are below base_layer.
    module, _, last = parameter.rpartition(".")
    wrapped = module in adapter.factors and not is_saved(parameter, adapter.config)
    return f"{module}{_INNER}{last}" if wrapped else parameter


def _carried_key(parameter: str, adapter: Adapter) -> str:
    module, _, last = parameter.rpartition(".")
    if module in adapter.factors:
        return f"{module}{_INNER}{last}"
    return f"{module}{_ORIGINAL}{last}" if parameter in adapter.saved else parameter
