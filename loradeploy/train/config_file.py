"""Read the settings of a training run from YAML and flags, and write them as YAML."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.errors import UsageError, shown
from loradeploy.files import read_text
from loradeploy.printable import printable
from loradeploy.train.config import (
    OF_ADAPTER,
    OF_PATHS,
    OPTIONAL,
    TrainConfig,
    check_initial,
    has_type,
)

if TYPE_CHECKING:
    import yaml

# Keys of the YAML file that are not fields of TrainConfig: see `read_paths`.
PATHS: Final = ("model", "data", "output")
_MAX_YAML_BYTES: Final = 1 << 20
# Whole numbers that mean the same in YAML 1.1 and 1.2.
_NUMBER: Final = re.compile(r"[-+]?(?:0|[1-9][0-9]*)$|0x[0-9a-fA-F]+$")
_LISTS: Final = ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save")
_PATTERNS: Final = ("columns", "rank_pattern", "alpha_pattern")


def read_config(
    config: TrainConfig | str | os.PathLike[str] | Mapping[str, Any] | None,
    flags: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The settings in `config`, a YAML file or its contents. `flags` take precedence.

    Raises:
        UsageError: an unreadable file, an unknown key (the nearest is suggested), a wrong type, or
            values that TrainConfig refuses.
    """
    known = dataclasses.asdict(config) if isinstance(config, TrainConfig) else read_yaml(config)
    values = {**known, **(flags or {})}
    values = {name: value for name, value in values.items() if name not in PATHS}
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = (
                f": did you mean {near[0]}?" if near else f": the settings are {', '.join(fields)}"
            )
            raise UsageError(f"unknown setting {name!r}{hint}")
        values[name] = _typed(name, value, str(fields[name].type))
    made = TrainConfig(**values)
    # Given settings are refused even if they equal the default, which a TrainConfig cannot show.
    check_initial(made, (flags or {}) if isinstance(config, TrainConfig) else values)
    return made


def read_paths(config: Mapping[str, Any], given: Mapping[str, str | None]) -> dict[str, str]:
    """The paths or hub ids of model, data and output: as `given`, else from `config`.

    Raises:
        UsageError: one of them is not a string.
    """
    paths = {name: given.get(name) or config.get(name) for name in PATHS}
    for name, path in paths.items():
        if path is not None and not isinstance(path, str):
            raise UsageError(f"`{name}` is {shown(path)}: give a path")
    return {name: path for name, path in paths.items() if path is not None}


def to_yaml(config: TrainConfig, *, explained: bool = False) -> str:
    """`config` as YAML that `read_config` reads, with a comment at each key if `explained`.

    The settings that the adapter of `init_adapter` has itself are omitted.
    """
    import yaml

    lines = []
    for field in dataclasses.fields(config):
        if config.init_adapter and field.name in OF_ADAPTER:
            continue
        value = getattr(config, field.name)
        if explained:
            lines.append(f"# {field.metadata['help']}\n")
        # Characters that would act on a terminal are written as YAML escapes.
        harmless = printable(str(value)) == str(value)
        lines.append(yaml.safe_dump({field.name: value}, allow_unicode=harmless, width=1000))
    return "".join(lines)


def _typed(name: str, value: Any, kind: str) -> Any:
    if kind.endswith(OPTIONAL) and value is None:
        return None
    kind = kind.removesuffix(OPTIONAL)
    if name in _PATTERNS and isinstance(value, Mapping):
        value = ",".join(f"{key}={number}" for key, number in value.items())
    if name == "layers_to_transform" and isinstance(value, int):
        value = str(value)
    if name in _LISTS and isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    if name in OF_PATHS and isinstance(value, os.PathLike):
        value = os.fspath(value)
    number = has_type(value, "float")
    # YAML 1.1 reads 1e-4 as a string.
    if kind == "float" and (number or isinstance(value, str)):
        try:
            return float(value)
        except (ValueError, OverflowError):
            number = False
    whole = number and (isinstance(value, int) or value.is_integer())
    if not {"int": whole, "float": number}.get(kind, has_type(value, kind)):
        raise UsageError(f"`{name}` is {shown(value)}: give a value of type {kind}")
    return {"int": int, "float": float}.get(kind, lambda v: v)(value)


def read_yaml(config: str | os.PathLike[str] | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The contents of the YAML file `config`; a mapping is returned unchanged.

    Raises:
        UsageError: the file is unreadable, or is not a mapping.
    """
    import yaml

    if config is None or isinstance(config, Mapping):
        return config or {}
    if not isinstance(config, str | os.PathLike):
        raise UsageError(f"`config` is {shown(config)}: give a YAML file or a mapping")
    file = Path(config)
    try:
        text = read_text(file, error=UsageError, limit=_MAX_YAML_BYTES)
        values = yaml.load(text, _strict_loader())
    except (yaml.YAMLError, RecursionError, ValueError) as problem:  # a date, or a long number
        text = " ".join(str(problem).split())
        raise UsageError(f"{file} is not valid YAML: {text}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{file} has no settings: write lines such as `rank: 16`")
    for name in values:
        if not isinstance(name, str):
            raise UsageError(f"{file}: unknown setting {shown(name)}, which is not a text")
    return values


@cache
def _strict_loader() -> type[yaml.SafeLoader]:
    """The safe loader, without what has two meanings: a repeated key, 010 and 1:20.

    YAML 1.1 reads these numbers as 8 and 80, YAML 1.2 as 10 and as a text. Here they are texts,
    which are refused as numbers.
    """
    import yaml

    number = "tag:yaml.org,2002:int"

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for name, count in Counter(names).items():
                if count > 1:
                    message = f"the key {shown(name)} is given {count} times"
                    raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
            return super().construct_mapping(node, deep)

    Strict.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag != number]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Strict.add_implicit_resolver(number, _NUMBER, [*"-+0123456789"])
    return Strict
