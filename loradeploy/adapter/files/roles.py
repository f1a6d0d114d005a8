"""Sort the tensors of a PEFT file by role. Each tensor is used, or refused by its key.

factors   of the update of a module        saved     fully trained parameters
rows      trained rows of a weight         carried   weights of the base that the file includes
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors, Kind, Rows
from loradeploy.adapter.algebra.experts import expert_factors, parameters_below, with_targets
from loradeploy.adapter.config import TOKENS, TYING, AdapterConfig
from loradeploy.adapter.files.formats import other_tensors
from loradeploy.adapter.files.keys import (
    MAGNITUDE,
    Key,
    are_below_value_head,
    is_value_head,
    read_keys,
)
from loradeploy.adapter.modules.patterns import endings
from loradeploy.adapter.modules.targets import (
    is_all_linear,
    is_saved,
    is_trained_bias,
    saved_by,
    untargeted,
)
from loradeploy.adapter.tasks import CLASSIFIER_HEADS, QA_HEADS, task_of_peft
from loradeploy.errors import AdapterError, listed, listed_names, shown
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logger_of(__name__)

BIAS: Final = "lora_B.bias"
# The names of A and B by the kind of layer.
PARTS: Final[Mapping[Kind, tuple[str, str]]] = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
    "conv2d": ("lora_A.weight", "lora_B.weight"),
    "experts": ("lora_A.weight", "lora_B.weight"),
}
# The name of positions in transformers' models (OPT, BART, Whisper) whose class computes its ids.
_OWN_IDS: Final = "embed_positions"


def adapter_from_arrays(arrays: Mapping[str, NDArray[Any]], config: AdapterConfig) -> Adapter:
    """Build an adapter from PEFT's tensors `arrays`, by key, and its `config`.

    Raises:
        AdapterError: as `load_adapter`, for tensors.
    """
    config, tensors = tensors_by_role(arrays, config)
    return Adapter(config=config, **tensors)


def tensors_by_role(
    arrays: Mapping[str, NDArray[Any]], config: AdapterConfig
) -> tuple[AdapterConfig, dict[str, Any]]:
    """The config with every fully trained module, and the tensors of the file by role.

    Each tensor is used or refused; one error lists all refused tensors. The exception is a value
    head that modules_to_save does not list: it is left out, with a warning.
    """
    arrays = _without_value_head(arrays, config)
    if are_below_value_head(arrays):
        _warn_of_wrapper(shown(min(arrays)))
    try:
        keys = read_keys(arrays)
    except AdapterError as problem:
        other = other_tensors({key: values.shape for key, values in arrays.items()})
        if other is None:
            raise
        raise AdapterError(f"the file {other}") from problem
    problems: list[str] = []
    parts, others = _sorted(arrays, keys, problems)
    factors = _all_factors(parts, config, problems)
    config = _targeted(factors, config, problems)
    slots, named = _slots(others, parts, config, problems)
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
    if config.extra.get(TOKENS) and not tensors["rows"] and not problems:
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


def _sorted(
    arrays: Mapping[str, NDArray[Any]], keys: Mapping[str, Key], problems: list[str]
) -> tuple[dict[str, dict[str, NDArray[Any]]], list[tuple[str, Key, NDArray[Any]]]]:
    """The parts of factors by module, and all other tensors; what is neither is a problem."""
    parts: dict[str, dict[str, NDArray[Any]]] = {}
    others: list[tuple[str, Key, NDArray[Any]]] = []
    for key, values in sorted(arrays.items()):
        what = keys[key]
        if values.dtype.kind != "f":
            problems.append(f"{key} is {values.dtype}, not floating point")
        elif what.part == "bias" and what.half != "lora_B":
            problems.append(f"{key} is a bias, which only lora_B can have (lora_bias)")
        elif what.part in ("factor", "bias"):
            half = f"{what.half}.weight" if what.half in ("lora_A", "lora_B") else what.half
            half = BIAS if what.part == "bias" else half
            first = parts.setdefault(what.name, {}).setdefault(half, values)
            if not np.array_equal(first, values):
                problems.append(_differs(key, f"{what.name}.{_short(half)}"))
        else:
            others.append((key, what, values))
    return parts, others


def _all_factors(
    parts: Mapping[str, Mapping[str, NDArray[Any]]], config: AdapterConfig, problems: list[str]
) -> dict[str, Factors]:
    """The factors by module (of experts by parameter). Refusals are added to `problems`."""
    factors: dict[str, Factors] = {}
    below = parameters_below(parts, config)
    if isinstance(below, str):
        problems.append(below)
        below = {}
    for module, tensors_of_module in parts.items():
        found = _factors(module, tensors_of_module)
        if module in below and isinstance(found, Factors):
            parameter, bias = below[module], found.bias
            found = expert_factors(found.A, found.B, config.rank_of(parameter), config)
            if isinstance(found, Factors):
                found = dataclasses.replace(found, bias=bias)
                if found.kind == "experts":
                    module = parameter
                elif parameter != f"{module}.weight":
                    found = (
                        f"has factors of {parameter}, which are neither of several experts nor of"
                        " its weight: merge it with PEFT and export the merged model"
                    )
        if isinstance(found, str):
            problems.append(f"{module} {found}")
        else:
            factors[module] = found
    return factors


def _targeted(
    factors: Mapping[str, Factors], config: AdapterConfig, problems: list[str]
) -> AdapterConfig:
    """`config` with tied modules, or all modules if it has no targets, as targets.

    Factors that PEFT ignores are added to `problems`.
    """
    working = [
        n
        for n, pair in factors.items()
        if pair.kind != "experts"
        and not config.targets_weight(n)
        and (np.any(pair.B) or pair.has_effect)
    ]
    ignored = untargeted(working, config)
    if is_all_linear(config):
        ignored += [n for n in working if factors[n].kind != "linear" and n not in ignored]
    if tied_factors := _tied(factors, config) & {*ignored}:
        ignored = [module for module in ignored if module not in tied_factors]
        config = _untied(config, factors)
    if working and not config.target_modules:
        _warn_of_targets()
        config = with_targets(config, factors)
    if ignored:
        problems.append(
            f"{listed_names(ignored, 3)}: the file has factors, and target_modules, exclude_modules"
            " or layers_to_transform in its config leave the module out (PEFT ignores them): remove"
            " them from the file, or correct the config"
        )
    return config


def _slots(
    others: Sequence[tuple[str, Key, NDArray[Any]]],
    parts: Container[str],
    config: AdapterConfig,
    problems: list[str],
) -> tuple[dict[tuple[str, str], NDArray[Any]], set[str]]:
    """Tensors other than factors by role and name; fully trained modules missing in `config`."""
    heads = _heads(others, parts, config)
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
            problems.append(_differs(key, name))
    return slots, named


def _heads(
    others: Iterable[tuple[str, Key, NDArray[Any]]], parts: Container[str], config: AdapterConfig
) -> tuple[str, ...]:
    """The output heads that count as fully trained, even if modules_to_save does not name them.

    They are those of the task. For other tasks, PEFT copies a head of the file into the
    model, as it does with the weights of the base. No module shares such a head, so that this
    is the same as a head of modules_to_save. A bias alone is one of all biases (`bias`: "all").
    """
    task = task_of_peft(config.task_type)
    if task is not None and task.trained_head:
        return task.heads
    present = {
        what.name.partition(".")[0]
        for _, what, _ in others
        if what.part == "parameter" and not what.name.endswith(".bias")
    }
    return tuple(
        head for head in (*CLASSIFIER_HEADS, *QA_HEADS) if head in present and head not in parts
    )


def _differs(key: str, name: str) -> str:
    """The message for a second tensor of `name` with other values."""
    return f"{key} differs from what the file has for {name} under another key"


def _without_value_head(
    arrays: Mapping[str, NDArray[Any]], config: AdapterConfig
) -> Mapping[str, NDArray[Any]]:
    """`arrays` without TRL's value head, which PEFT does not load either."""
    heads = [key for key in arrays if is_value_head(key)]
    if not heads or "v_head" in config.modules_to_save:
        return arrays
    _warn_of_value_head(listed_names(heads))
    return {key: values for key, values in arrays.items() if key not in heads}


@functools.cache  # warns once, although an export reads an adapter several times
def _warn_of_value_head(names: str) -> None:
    logger.warning(
        "%s: a value head of TRL is beside the adapter. It is left out, as in PEFT: the model's"
        " outputs do not depend on it",
        names,
    )


@functools.cache
def _warn_of_wrapper(key: str) -> None:
    logger.warning(
        "%s and all other keys have TRL's prefix pretrained_model. before the model's names. It is"
        " ignored here. PEFT does not ignore it, loads none of these tensors and computes the base:"
        " rename the keys for PEFT",
        key,
    )


@functools.cache
def _warn_of_targets() -> None:
    logger.warning(
        "target_modules in the adapter's config is missing or empty: all modules that have factors"
        " in its file are adapted. PEFT refuses an empty list; without one it adapts the modules"
        " that it lists for the type of the model (q_proj and v_proj of a Llama) and ignores other"
        " factors: name the modules in the config"
    )


def _saved_as(parameter: str, saving: AdapterConfig) -> str:
    """The entry of modules_to_save for `parameter`: a head that PEFT knows, or its module."""
    return saved_by(parameter, saving) or parameter.rpartition(".")[0]


def _rows(module: str, values: NDArray[Any], config: AdapterConfig) -> Rows | str:
    """The trained rows of `module`'s weight, or why they are refused."""
    if module.rpartition(".")[2] == _OWN_IDS:
        return (
            f"{module} has trained rows, and is an embedding that computes its positions itself:"
            " PEFT looks the rows up by the layer's first input (a mask or tokens): train without"
            " them"
        )
    indices = config.extra.get(TOKENS)
    if isinstance(indices, Mapping):
        indices = next((indices[end] for end in endings(module) if end in indices), None)
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


def _tied(factors: Mapping[str, Factors], config: AdapterConfig) -> set[str]:
    """The linear layers whose factors are an embedding's, transposed (`ensure_weight_tying`).

    PEFT removes them from `target_modules`, but adapts them.
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
    """`config` without weight tying, and with exactly the modules of `factors` as targets.

    The settings that excluded tied modules are removed.
    """
    extra = {name: value for name, value in config.extra.items() if name != TYING}
    return with_targets(dataclasses.replace(config, extra=extra), factors)


def _factors(module: str, parts: Mapping[str, NDArray[Any]]) -> Factors | str:
    """The factors in the tensors of `module`, or why they are refused."""
    kind: Kind = "embedding" if any("embedding" in part for part in parts) else "linear"
    vectors = (MAGNITUDE, BIAS)
    if kind == "embedding" and module.rpartition(".")[2] == _OWN_IDS:
        return (
            "is an embedding that computes its positions itself, and PEFT looks its factors up by"
            " the layer's first input (a mask or tokens), which gives other results than merging"
            " them: train without it"
        )
    if kind == "linear" and any(v.ndim > 2 for p, v in parts.items() if p not in vectors):
        kind = "conv2d"
    half_A, half_B = PARTS[kind]
    if missing := [half for half in (half_A, half_B) if half not in parts]:
        present = min(parts, key=vectors.__contains__)
        return f"has {_short(present)} but no {_short(missing[0])}"
    if surplus := [part for part in parts if part not in (half_A, half_B, *vectors)]:
        return f"has {_short(half_A)} and {_short(surplus[0])} too"
    magnitude = parts.get(MAGNITUDE)
    if magnitude is not None:
        magnitude = magnitude.reshape(-1)
    return Factors(parts[half_A], parts[half_B], magnitude, kind, bias=parts.get(BIAS))


def _short(part: str) -> str:
    return part.removesuffix(".weight")
