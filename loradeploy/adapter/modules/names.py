"""Rename an adapter's modules to the names of a base model.

A module may have another name in the model that the adapter was trained on: transformers has
renamed paths, a model without a head lacks the prefix of a model with one, and wrappers add one.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from loradeploy.adapter.adapter import Adapter
from loradeploy.adapter.algebra.expert_lists import with_joined_experts
from loradeploy.adapter.algebra.experts import with_targets
from loradeploy.adapter.modules.renamings import Renaming
from loradeploy.adapter.modules.targets import is_saved
from loradeploy.adapter.scaling import with_ranks
from loradeploy.errors import AdapterMismatchError
from loradeploy.printable import logger_of

logger = logger_of(__name__)

_FACTOR: Final = ".lora_A.weight"  # transformers' rules apply to full keys
_Value = TypeVar("_Value")

# These prefixes are parts of a model, not wrappers: their modules are different modules.
_PARTS: Final = re.compile(r"vision|visual|image|video|audio|speech|encoder|decoder")

# The prefix of a name in the adapter, and the one in the base.
Prefixes = tuple[str, str]


def named_as(
    adapter: Adapter, modules: Collection[str], renamings: Callable[[], Sequence[Renaming]]
) -> Adapter:
    """`adapter` with its modules named as in a base that has `modules`.

    Separate experts are first joined (algebra/expert_lists.py). Unknown names are renamed by
    transformers' `renamings`. If no name is known then, and one change of prefix maps all or most
    names to modules of the base, that change is applied. Names that remain unknown are kept;
    `check_fit` refuses them. Ranks and scalings are those that the config has for the old names
    (PEFT would match its patterns with the new ones).

    Raises:
        AdapterMismatchError: several changes of prefix are possible, two names become equal, or
            only some of a layer's experts have factors.
    """
    known = frozenset(modules)
    if any(".experts." in name and name not in known for name in adapter.factors):
        rules = renamings()
        adapter = with_joined_experts(adapter, known, lambda name: _module_renamed(name, rules))
    names = _Names(adapter.factors, (*adapter.saved, *adapter.carried, *adapter.rows))
    if all(names.module_of(name) in known for name in names.all):
        return adapter
    final = _by_renamings(names, known, renamings())
    working = [name for name in adapter.factors if adapter.factors[name].has_effect]
    # If some names are known, the others belong to another part of the model, not to a wrapper.
    unmatched = [] if any(final[name] in known for name in working) else working
    prefixes = _prefixes(unmatched, known)
    if len(prefixes) > 1:
        shown = " or ".join(_with_prefix(unmatched[0], p) for p in sorted(prefixes)[:2])
        raise AdapterMismatchError(
            f"{unmatched[0]} is not in this base and may be {shown}: give the base that the"
            " adapter was trained on, or rename the tensors of the adapter"
        )
    for before, after in prefixes:
        for name, current in final.items():
            moved = after + current.removeprefix(before)
            matches = current.startswith(before) and names.module_of(name, current) not in known
            if matches and names.module_of(name, moved) in known:
                final[name] = moved
    if all(name == current for name, current in final.items()):
        return adapter
    if len({(name in names.modules, current) for name, current in final.items()}) < len(final):
        raise AdapterMismatchError("two modules of the adapter have the same name in this base")
    first = next(name for name, current in final.items() if name != current)
    logger.info(
        "modules of the adapter are renamed for this base: %s is %s, and so on", first, final[first]
    )
    return with_names(adapter, final)


@dataclass(frozen=True)
class _Names:
    """The names in an adapter: `modules` with factors, and `parameters` of any module."""

    modules: Collection[str]
    parameters: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.modules, *self.parameters)

    def module_of(self, name: str, called: str | None = None) -> str:
        """The module of `name`, which may be `called` otherwise in the base."""
        called = name if called is None else called
        return called if name in self.modules else called.rpartition(".")[0]


def _by_renamings(
    names: _Names, known: Collection[str], rules: Sequence[Renaming]
) -> dict[str, str]:
    """The names in the base, by transformers' rules; those that stay unknown are kept."""
    renamed = _by_new_name(known, rules)  # a graph may have the old names too
    final = {}
    for name in names.all:
        is_module = name in names.modules
        new = _module_renamed(name, rules) if is_module else _renamed(name, rules)
        current = names.module_of(name, new)
        current = current if current in known else renamed.get(current, "")
        is_new = names.module_of(name) not in known and bool(current)
        leaf = "" if is_module else "." + name.rpartition(".")[2]
        final[name] = current + leaf if is_new else name
    return final


def _by_new_name(modules: Collection[str], rules: Sequence[Renaming]) -> dict[str, str]:
    """The names of the base's modules by transformers' current ones, where only one has it."""
    found: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for module in modules if rules else ():
        new = _module_renamed(module, rules)
        counts[new] += 1
        found[new] = module
    return {new: module for new, module in found.items() if counts[new] == 1}


def _module_renamed(name: str, rules: Sequence[Renaming]) -> str:
    return _renamed(name + _FACTOR, rules).removesuffix(_FACTOR)


def _renamed(name: str, rules: Sequence[Renaming]) -> str:
    for rule in rules:
        name = rule(name)
    return name


def _prefixes(names: Sequence[str], known: Collection[str]) -> set[Prefixes]:
    """Every change of prefix that maps `names` to modules of the base: all, or most of them.

    Only changes that add, remove or extend a prefix are included, in their shortest form. Most of
    the names count only if one change maps more than half of them: the base has another head then.
    """
    endings: dict[str, list[str]] = defaultdict(list)
    for module in known:
        for start in _starts(module):
            endings[module[start:]].append(module[:start])
    mapped: Counter[Prefixes] = Counter()
    for name in names:
        candidates = {
            (name[:start], before)
            for start in _starts(name)
            for before in endings.get(name[start:], ())
            if name[:start].startswith(before) or before.startswith(name[:start])
        }
        mapped.update(
            pair for pair in set(map(_shortened, candidates)) if not _PARTS.search("".join(pair))
        )
    found = {pair for pair, count in mapped.items() if count == len(names)}
    most = {pair for pair, count in mapped.items() if 2 * count > len(names)}
    return found or (most if len(most) == 1 else set())


def _starts(name: str) -> list[int]:
    """The positions at which the parts of a dotted name begin."""
    return [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]


def _shortened(prefixes: Prefixes) -> Prefixes:
    """`prefixes` without their common last parts."""
    ours, theirs = (prefix.split(".")[:-1] for prefix in prefixes)
    while ours and theirs and ours[-1] == theirs[-1]:
        ours, theirs = ours[:-1], theirs[:-1]
    one, other = ("".join(f"{part}." for part in parts) for parts in (ours, theirs))
    return one, other


def _with_prefix(name: str, prefixes: Prefixes) -> str:
    before, after = prefixes
    return after + name.removeprefix(before)


def with_names(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """`adapter` with its modules and parameters renamed. `names` must include all of them."""

    def renamed(values: Mapping[str, _Value]) -> dict[str, _Value]:
        return {names[name]: value for name, value in values.items()}

    config = adapter.config
    ranks = {names[name]: pair.rank for name, pair in adapter.factors.items()}
    scalings = {names[name]: adapter.scaling(name) for name in adapter.factors}
    saved = renamed(adapter.saved)
    factors = renamed(adapter.factors)
    config = with_targets(
        with_ranks(config, ranks, scalings)
        if config.rank_pattern or config.alpha_pattern
        else config,
        factors,
    )
    modules = {
        new.rpartition(".")[0]
        for old, new in names.items()
        if old in adapter.saved and is_saved(old, adapter.config) and not is_saved(new, config)
    }
    config = dataclasses.replace(
        config, modules_to_save=(*config.modules_to_save, *sorted(modules))
    )
    return dataclasses.replace(
        adapter,
        config=config,
        factors=factors,
        saved=saved,
        carried=renamed(adapter.carried),
        rows=renamed(adapter.rows),
    )
