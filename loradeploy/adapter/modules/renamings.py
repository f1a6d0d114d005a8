"""Module paths that transformers has renamed: from an adapter's old names to the current ones.

The table beside this file is copied from transformers (tools/renamings.py writes it, a test
compares it with the installed version). Rules apply as in transformers and PEFT.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

# Renamings for every model.
_ALL: Final = "legacy"

Rule = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Submodel:
    """A transformers model inside a model: its path (empty: the model itself), class and type."""

    path: str
    class_name: str
    model_type: str


@dataclass(frozen=True)
class Renaming:
    """Replaces a match of `sources` by its replacement in `targets`, in names below `scope`.

    `scope`: the path of the submodel without the base model's prefix; None for all names.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    scope: str | None = None
    base_prefix: str = ""

    def __call__(self, name: str) -> str:
        """`name` renamed, or unchanged if no rule matches."""
        before, rest = "", name
        if self.scope is not None:
            scope = f"{self.scope}." if self.scope else ""
            prefixed = f"{self.base_prefix}.{scope}" if self.base_prefix else scope
            before = next((p for p in (prefixed, scope) if name.startswith(p)), "\0")
            if before == "\0":
                return name
            rest = name.removeprefix(before)
        found = _compiled(self.sources).search(rest)
        if found is None:
            return name
        groups = found.groupdict()
        number = next(g for g, text in groups.items() if text is not None)
        target = self.targets[0]
        if r"\1" in target:
            inner = _compiled(self.sources).groupindex[number] + 1
            target = target.replace(r"\1", found.group(inner))
        return before + rest.replace(found.group(0), target, 1)


def renamings(submodels: Sequence[Submodel], base_prefix: str) -> tuple[Renaming, ...]:
    """The renamings of the model that has `submodels`, in the order of its modules.

    Rules are found by class, else by model type. A submodel below one whose class or type was found
    already adds no rules of that class or type.
    """
    table = _table()
    found: list[Renaming] = []
    seen: dict[str, list[str]] = defaultdict(list)

    def is_inside(path: str, paths: Sequence[str]) -> bool:
        return any(outer == "" or path.startswith(f"{outer}.") for outer in paths)

    for model in submodels:
        if is_inside(model.path, seen[model.class_name]):
            continue
        rules = table.get(model.class_name)
        by_class = rules is not None
        if not by_class:
            if is_inside(model.path, seen[model.model_type]):
                continue
            rules = table.get(model.model_type)
        if rules is None:
            continue
        scope = None
        if model.path:
            scope = model.path.removeprefix(base_prefix).removeprefix(".")
        found += [Renaming(*rule, scope, base_prefix) for rule in rules]
        seen[model.class_name].append(model.path)
        if not by_class:
            seen[model.model_type].append(model.path)
    return (*found, *(Renaming(*rule) for rule in table[_ALL]))


def submodels_of(architecture: str, model_type: str) -> tuple[Submodel, ...]:
    """The transformers models in a model, by its config: itself and, if renamed, its base model."""
    inner, path = _base_models().get(model_type, ("", ""))
    models = [Submodel("", architecture, model_type)]
    if inner and inner != architecture:
        models.append(Submodel(path, inner, model_type))
    return known(models)


def base_prefix_of(model_type: str) -> str:
    """The prefix of the base model's paths in a model of this type."""
    return _base_models().get(model_type, ("", "model"))[1]


def known(submodels: Sequence[Submodel]) -> tuple[Submodel, ...]:
    """`submodels`, or () if the table has no renaming for them."""
    table = _table()
    renamed = any(table.get(m.class_name) or table.get(m.model_type) for m in submodels)
    return tuple(submodels) if renamed else ()


@cache
def _table() -> Mapping[str, tuple[Rule, ...]]:
    read = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return {
        name: tuple((tuple(sources), tuple(targets)) for sources, targets in rules)
        for name, rules in read.items()
    }


@cache
def _base_models() -> Mapping[str, tuple[str, str]]:
    """The class of the base model and its path, by model type, if the class has renamings."""
    file = Path(__file__).with_name("base_models.json")
    read = json.loads(file.read_text(encoding="utf-8"))
    return {model_type: (name, path) for model_type, (name, path) in read.items()}


@cache
def _compiled(sources: tuple[str, ...]) -> re.Pattern[str]:
    """All sources in one pattern, the longest first. A source matches up to the end of a word."""
    branches = []
    for number, source in sorted(enumerate(sources), key=lambda item: -len(item[1])):
        pattern = source.replace("*.", r".*\.")
        if re.search(r"[a-zA-Z0-9]$", pattern):
            pattern += r"(?!\w)"
        branches.append(f"(?P<g{number}>{pattern})")
    return re.compile("|".join(branches))
