"""Which modules of a model an adapter's configuration means."""

from __future__ import annotations

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
    return saved_by(parameter, config) is not None


def saved_by(parameter: str, config: AdapterConfig) -> str | None:
    """The first of `modules_to_save` by which `parameter` is trained whole; None if it is not."""
    names = config.saved_by_length
    if not names:
        return None
    ends = [place for place, letter in enumerate(parameter) if letter == "."]
    found = [
        number
        for end in ends
        for length, table in names.items()
        if length <= end and (number := table.get(parameter[end - length : end])) is not None
    ]
    return config.modules_to_save[min(found)] if found else None


def is_trained_bias(parameter: str, targets: Container[str], config: AdapterConfig) -> bool:
    """Whether the model's `parameter` is a bias that `config.bias` says is trained."""
    module, _, last = parameter.rpartition(".")
    return last == "bias" and (
        config.bias == "all" or (config.bias == "lora_only" and module in targets)
    )


def _is_target(name: str, config: AdapterConfig, linear: set[str]) -> bool:
    if _listed(name, "exclude_modules", config) or _inside_saved(name, config):
        return False
    targets = config.target_modules
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return name in linear
        return _listed(name, "target_modules", config)
    return _listed(name, "target_modules", config) and _in_layers(name, config)


def _listed(name: str, field: str, config: AdapterConfig) -> bool:
    """Whether `name` is what the `field` of the config tells: a list of ends, or an expression."""
    told = getattr(config, field)
    if not told:
        return False
    if isinstance(told, str):
        return config.matcher.fullmatch(told, name)
    ends = config.listed[field]
    return name in ends or any(
        name[place + 1 :] in ends for place, letter in enumerate(name) if letter == "."
    )


def _inside_saved(name: str, config: AdapterConfig) -> bool:
    """Whether `name` is one of `modules_to_save`, or inside one: PEFT takes them for patterns."""
    saved = config.listed["modules_to_save"]
    if not saved:
        return False
    if not saved.isdisjoint(name.split(".")):
        return True
    return any(
        config.matcher.match(rf"(^|.*\.){pattern}($|\..*)", name)
        for pattern in config.saved_expressions
    )


def _in_layers(name: str, config: AdapterConfig) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == ():
        return True
    patterns = config.layers_pattern or (r"[^.]*",)
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    # The first index in the name is the layer's: experts inside a layer have indices of their own.
    lead = r".*?\." if not config.layers_pattern else r"(?:^|.*?\.)"
    for pattern in patterns:
        found = config.matcher.match(rf"{lead}{pattern}\.(?P<index>\d+)\.", name)
        if found is not None:
            return int(found["index"]) in config.layers
    return False
