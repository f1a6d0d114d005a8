"""Split an adapter: bundles of one model take their own modules, and no head that they lack."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

from loradeploy.adapter.adapter import Adapter
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.modules.renamings import Renaming
from loradeploy.errors import AdapterMismatchError, listed_names
from loradeploy.printable import logger_of

logger = logger_of(__name__)

# The heads of masked language models in transformers: of BERT, RoBERTa, DistilBERT, ELECTRA and
# ALBERT. ModernBERT's has the names of its classifiers' heads.
_MASKED_LM: Final = re.compile(
    r"(cls\.predictions|lm_head\.(dense|decoder|layer_norm|bias$)|vocab_(transform|projector)"
    r"|vocab_layer_norm|generator_(predictions|lm_head)|predictions\.(dense|decoder|LayerNorm))(\.|$)"
)


def own_part(
    adapter: Adapter, others: Collection[str], rules: Callable[[], Sequence[Renaming]] = tuple
) -> Adapter:
    """`adapter` without the tensors of the modules `others`, which are in another bundle.

    If the omitted tensors have an effect, a warning names their modules, and `part_of` of the
    result is the digest of the complete adapter. Names are compared as they are and as renamed by
    `rules`, so that older names are recognized.

    Raises:
        AdapterMismatchError: no tensors are left.
    """
    names, of_others = tensor_names(adapter), _of_others(others, rules)
    left_out = list(filter(of_others, names))
    if not left_out:
        return adapter
    if len(left_out) == len(names):
        owners = listed_names(_modules_of(left_out, others, rules))
        raise AdapterMismatchError(
            f"all of its tensors are of {owners}, in another bundle"
            " of this model: give it there, and no adapter here"
        )
    active = [name for name in left_out if _is_active(name, adapter)]
    if active:
        logger.warning(
            "%d tensors of the adapter are of %s, which is in another bundle of this model",
            len(active),
            listed_names(_modules_of(active, others, rules)),
        )
        adapter = dataclasses.replace(adapter, part_of=adapter.whole_digest)
    excluded = adapter.config.exclude_modules
    # Excluded modules count as not targeted, so a model that has them does not miss their tensors.
    if excluded is None or isinstance(excluded, tuple):
        modules = [name for name in left_out if name in adapter.factors]
        config = dataclasses.replace(adapter.config, exclude_modules=(*(excluded or ()), *modules))
        adapter = dataclasses.replace(adapter, config=config)
    return without(adapter, set(left_out))


def without_masked_lm_head(adapter: Adapter, modules: Collection[str]) -> Adapter:
    """`adapter` without the tensors of a masked language model's head that the base lacks.

    An encoder without this head computes the same hidden states. A warning names the modules if
    their tensors have an effect. `modules`: the names of the base's modules.
    """
    tops = {name.partition(".")[0] for name in modules}
    left_out = [
        name
        for name in tensor_names(adapter)
        if _MASKED_LM.match(name) and name.partition(".")[0] not in tops
    ]
    if not left_out or len(left_out) == len(tensor_names(adapter)):
        return adapter
    if active := [name for name in left_out if _is_active(name, adapter)]:
        _warn_of_head(listed_names(active, 3))
    config, excluded = adapter.config, adapter.config.exclude_modules
    if excluded is None or isinstance(excluded, tuple):  # see own_part
        modules_left = [name for name in left_out if name in adapter.factors]
        config = dataclasses.replace(config, exclude_modules=(*(excluded or ()), *modules_left))
    return without(dataclasses.replace(adapter, config=config), set(left_out))


@functools.cache  # warns once, although an export and a run fit an adapter several times
def _warn_of_head(names: str) -> None:
    logger.warning(
        "%s: of a masked language model's head, which this base lacks. They are left out: its"
        " outputs do not depend on them",
        names,
    )


def without(adapter: Adapter, left_out: Collection[str]) -> Adapter:
    """`adapter` without the tensors `left_out`, and without modules_to_save that have no others."""
    kept = {
        group: {name: value for name, value in values.items() if name not in left_out}
        for group, values in _groups(adapter).items()
    }
    names = [name for values in kept.values() for name in values]
    config = saving_without(adapter.config, left_out, names)
    changed: dict[str, Any] = {**kept, "config": config}
    return dataclasses.replace(adapter, **changed)


def saving_without(
    config: AdapterConfig, left_out: Collection[str], kept: Collection[str]
) -> AdapterConfig:
    """`config` without the modules_to_save that have tensors in `left_out` and none in `kept`."""
    saved = tuple(
        module
        for module in config.modules_to_save
        if _names_any(module, kept) or not _names_any(module, left_out)
    )
    return dataclasses.replace(config, modules_to_save=saved)


def tensor_names(adapter: Adapter) -> list[str]:
    """The modules and parameters of all of the adapter's tensors, group by group."""
    return [name for group in _groups(adapter).values() for name in group]


def has_part(
    adapter: Adapter, others: Collection[str], rules: Callable[[], Sequence[Renaming]]
) -> bool:
    """Whether `adapter` has tensors besides those of the modules `others`; see `own_part`."""
    of_others = _of_others(others, rules)
    return not all(map(of_others, tensor_names(adapter)))


def _of_others(
    others: Collection[str], rules: Callable[[], Sequence[Renaming]]
) -> Callable[[str], bool]:
    """Return a predicate: whether a name, as is or renamed, is in one of the modules `others`."""
    known = rules() if others else ()

    def is_of(name: str) -> bool:
        renamed = name
        for rule in known:
            renamed = rule(renamed)
        return _is_below(name, others) or _is_below(renamed, others)

    return is_of


def _names_any(module: str, names: Collection[str]) -> bool:
    """Whether `module`, an entry of `modules_to_save`, is a part of one of `names`."""
    return any(f".{module}." in f".{name}." for name in names)


def _groups(adapter: Adapter) -> dict[str, Mapping[str, Any]]:
    """All of the adapter's tensors, by the field of `Adapter` that contains them."""
    return {
        "factors": adapter.factors,
        "saved": adapter.saved,
        "carried": adapter.carried,
        "rows": adapter.rows,
    }


def _is_active(name: str, adapter: Adapter) -> bool:
    pair = adapter.factors.get(name)
    return pair is None or pair.has_effect


def any_below(names: Collection[str], modules: Collection[str]) -> bool:
    """Whether one of `names` is a module of `modules`, or inside of one."""
    return any(_is_below(name, modules) for name in names)


def _is_below(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _modules_of(
    names: Collection[str], modules: Collection[str], rules: Callable[[], Sequence[Renaming]]
) -> list[str]:
    return [module for module in modules if any(map(_of_others([module], rules), names))]
