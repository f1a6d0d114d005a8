"""Which modules of a model an adapter's configuration means."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence

from loradeploy.adapter.config import AdapterConfig

ALL_LINEAR = "all-linear"


def match_targets(
    names: Iterable[str], config: AdapterConfig, *, linear_names: Sequence[str] = ()
) -> list[str]:
    """The `names` that `config` targets, in their order, by PEFT's rules.

    A list matches a module's whole name or its end after a dot, a string is a regular expression
    for the whole name, and "all-linear" means `linear_names`: every linear layer but the output
    head. `exclude_modules` and `modules_to_save` are taken out; `layers_to_transform` keeps the
    given layer indices (lists only, as in PEFT).
    """
    linear = set(linear_names)
    return [name for name in names if _is_target(name, config, linear)]


def is_saved(parameter: str, config: AdapterConfig) -> bool:
    """Whether the model's `parameter` is trained whole because of `modules_to_save`.

    As PEFT does: every module whose name ends in a listed one, with all that is inside it.
    """
    *modules, _ = parameter.split(".")
    return any(
        ".".join(modules[: depth + 1]).endswith(name)
        for depth in range(len(modules))
        for name in config.modules_to_save
    )


def is_trained_bias(parameter: str, targets: Container[str], config: AdapterConfig) -> bool:
    """Whether the model's `parameter` is a bias that `config.bias` says is trained."""
    module, _, last = parameter.rpartition(".")
    return last == "bias" and (
        config.bias == "all" or (config.bias == "lora_only" and module in targets)
    )


def _is_target(name: str, config: AdapterConfig, linear: set[str]) -> bool:
    if _listed(name, config.exclude_modules):
        return False
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save):
        return False
    targets = config.target_modules
    if isinstance(targets, str):
        return name in linear if targets.lower() == ALL_LINEAR else _listed(name, targets)
    return _listed(name, targets) and _in_layers(name, config)


def _listed(name: str, names: str | tuple[str, ...] | None) -> bool:
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == listed or name.endswith(f".{listed}") for listed in names)


def _in_layers(name: str, config: AdapterConfig) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == ():
        return True
    patterns = config.layers_pattern or (r"[^.]*",)
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    # The first index in the name is the layer's: experts inside a layer have indices of their own.
    lead = r".*?\." if not config.layers_pattern else r"(?:^|.*?\.)"
    for pattern in patterns:
        if found := re.match(rf"{lead}{pattern}\.(?P<index>\d+)\.", name):
            index = int(found["index"])
            return index == layers if isinstance(layers, int) else index in layers
    return False
