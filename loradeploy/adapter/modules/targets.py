"""Match module names with the targets of an adapter's configuration."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.tasks import OUTPUT_HEADS

ALL_LINEAR = "all-linear"


def is_all_linear(config: AdapterConfig) -> bool:
    """Whether `target_modules` is "all-linear": every linear layer but the output head."""
    targets = config.target_modules
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def match_targets(
    names: Iterable[str], config: AdapterConfig, *, linear_names: Sequence[str] = ()
) -> list[str]:
    """The `names` that `config` targets, in their order, by PEFT's rules.

    A list entry matches a full module name or its ending after a dot, a string is a regular
    expression for the full name, and "all-linear" means `linear_names`: every linear layer but the
    output head. `exclude_modules` and `modules_to_save` are excluded. `layers_to_transform` keeps,
    of the names that match the ending of a list entry, only those in the given layers. Modules
    whose weight is in `target_parameters` are included in any case.
    """
    linear = set(linear_names)
    return [name for name in names if _is_target(name, config, linear)]


def untargeted(names: Iterable[str], config: AdapterConfig) -> list[str]:
    """The `names`, of modules with factors in a file, that `config` does not target.

    PEFT ignores their factors. "all-linear" leaves out the output head. A regular expression may be
    for other names than the file's (of a renamed or wrapped model): if it matches none of them, it
    is compared with their ends, and if it matches none of these either, it leaves nothing out.
    """
    known = tuple(names)
    targets = config.target_modules
    if is_all_linear(config):
        matched = {name for name in known if name.rpartition(".")[2] not in OUTPUT_HEADS}
    elif targets and isinstance(targets, str):
        matched = (
            {name for name in known if config.matcher.fullmatch(targets, name)}
            or {name for name in known if _matches_an_end(targets, name, config)}
            or {*known}
        )
    elif targets and not isinstance(targets, str):
        matched = {name for name in known if _is_target_of_list(name, config)}
    else:
        matched = {*known}
    return [
        n
        for n in known
        if not config.targets_weight(n)
        and (n not in matched or _listed(n, "exclude_modules", config))
    ]


def _matches_an_end(pattern: str, name: str, config: AdapterConfig) -> bool:
    """Whether `pattern` matches `name` without some of its first parts."""
    starts = (0, *(index + 1 for index, letter in enumerate(name) if letter == "."))
    return any(config.matcher.fullmatch(pattern, name[start:]) for start in starts)


def is_saved(parameter: str, config: AdapterConfig) -> bool:
    """Whether `modules_to_save` includes the model's `parameter`.

    As in PEFT: every module whose name ends in an entry, with its submodules.
    """
    return saved_by(parameter, config) is not None


def saved_by(parameter: str, config: AdapterConfig) -> str | None:
    """The first entry of `modules_to_save` that includes `parameter`, or None."""
    names = config.saved_by_length
    if not names:
        return None
    ends = [index for index, letter in enumerate(parameter) if letter == "."]
    found = [
        number
        for end in ends
        for length, table in names.items()
        if length <= end and (number := table.get(parameter[end - length : end])) is not None
    ]
    return config.modules_to_save[min(found)] if found else None


def is_trained_bias(parameter: str, targets: Container[str], config: AdapterConfig) -> bool:
    """Whether the model's `parameter` is a bias that is trained, by `config.bias`."""
    module, _, last = parameter.rpartition(".")
    return last == "bias" and (
        config.bias == "all" or (config.bias == "lora_only" and module in targets)
    )


def _is_target(name: str, config: AdapterConfig, linear: set[str]) -> bool:
    if config.targets_weight(name):
        return True
    if _listed(name, "exclude_modules", config) or _inside_saved(name, config):
        return False
    targets = config.target_modules
    if is_all_linear(config):
        return name in linear
    if not targets or isinstance(targets, str):
        return _listed(name, "target_modules", config)
    return _is_target_of_list(name, config)


def _is_target_of_list(name: str, config: AdapterConfig) -> bool:
    """Whether the list `target_modules` targets `name`: PEFT checks no layer for a full name."""
    return name in config.listed["target_modules"] or (
        _listed(name, "target_modules", config) and _in_layers(name, config)
    )


def _listed(name: str, field: str, config: AdapterConfig) -> bool:
    """Whether `name` matches `field` of the config, a list of endings or a regular expression."""
    entries = getattr(config, field)
    if not entries:
        return False
    if isinstance(entries, str):
        return config.matcher.fullmatch(entries, name)
    ends = config.listed[field]
    return name in ends or any(
        name[index + 1 :] in ends for index, letter in enumerate(name) if letter == "."
    )


def _inside_saved(name: str, config: AdapterConfig) -> bool:
    """Whether `name` is in `modules_to_save` or below an entry; PEFT reads entries as patterns."""
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
    # The first index in the name is that of the layer: experts in a layer are numbered too.
    lead = r".*?\." if not config.layers_pattern else r"(?:^|.*?\.)"
    for pattern in patterns:
        found = config.matcher.match(rf"{lead}{pattern}\.(?P<index>\d+)\.", name)
        if found is not None:
            return int(found["index"]) in config.layers
    return False
