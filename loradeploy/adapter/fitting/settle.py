"""Remove from an adapter copies of base weights, and zero factors of modules the base lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.adapter import Adapter, Rows
from loradeploy.adapter.config import TOKENS, AdapterConfig
from loradeploy.adapter.files.digest import tensors_digest
from loradeploy.adapter.fitting.parts import saving_without
from loradeploy.adapter.modules.targets import match_targets
from loradeploy.errors import AdapterMismatchError
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logger_of(__name__)


def values_digest(values: NDArray[Any]) -> str:
    """Digest of the values of one parameter, independent of the dtype they are stored in."""
    return tensors_digest({"": values}, {})


def without_copies(adapter: Adapter, is_own: Callable[[str, NDArray[Any]], bool]) -> Adapter:
    """`adapter` without the carried weights that equal those of the base.

    `is_own`: whether the values [any shape] of a parameter equal the base's.
    """
    carried = {n: values for n, values in adapter.carried.items() if not is_own(n, values)}
    if len(carried) == len(adapter.carried):
        return adapter
    return dataclasses.replace(adapter, carried=carried)


def with_rows(
    adapter: Adapter,
    values_of: Callable[[str], NDArray[Any] | None],
    most: int,
    tables: Collection[str] = (),
) -> Adapter:
    """`adapter` with trained rows in place of tables that differ from the base's in few rows.

    PEFT saves the whole embedding if words were added in its spare rows, or after them.
    `values_of`: the base's values of an embedding or output head by parameter, None for others.
    `most`: the maximum number of rows that may differ, including rows after the base's last one.
    `tables`: the fully trained weights that may be replaced too.

    Raises:
        AdapterMismatchError: a weight with more rows than the base's differs in more than `most`.
    """
    found: dict[str, Sequence[int]] = {}
    given = {**adapter.carried, **{n: v for n, v in adapter.saved.items() if n in tables}}
    for name, values in given.items():
        own = values_of(name)
        if own is None or values.ndim != 2 or own.shape[1:] != values.shape[1:]:
            continue
        if len(values) < len(own):
            continue
        shared = values[: len(own)].astype(np.float32)
        changed = np.flatnonzero((own.astype(np.float32) != shared).any(axis=1))
        different = [*changed.tolist(), *range(len(own), len(values))]
        if 0 < len(different) <= most:
            found[name] = different
        elif len(values) > len(own):
            raise AdapterMismatchError(
                f"{name} has {len(values)} rows, {len(values) - len(own)} more than the base's, and"
                f" differs in {len(changed)} of the base's {len(own)}: side inputs have at most"
                f" {most} rows of a weight, merge it instead, `merge=True`"
            )
    return rows_in_place_of(adapter, found)


def rows_in_place_of(adapter: Adapter, indices: Mapping[str, Sequence[int]]) -> Adapter:
    """`adapter` with trained rows in place of whole weights, carried or saved ones.

    `indices`: the rows, by parameter. If the adapter already has trained rows of a weight, these
    take precedence over the whole weight, which is removed if they include all of `indices`, and
    kept otherwise.
    """
    covered = [
        name
        for name, own in indices.items()
        if name in adapter.rows and {*own} <= {*adapter.rows[name].indices}
    ]
    named = adapter.config.extra.get(TOKENS) or {}
    if not isinstance(named, Mapping):  # a list for the embedding
        named = {n.removesuffix(".weight"): list(own.indices) for n, own in adapter.rows.items()}
    new = {n: own for n, own in indices.items() if n not in adapter.rows}
    whole = {**adapter.carried, **adapter.saved}
    rows = {name: Rows(tuple(own), whole[name][list(own)]) for name, own in new.items()}
    found = with_rows_for(adapter, [*covered, *new], {**adapter.rows, **rows})
    if not new:
        return found
    listed = {name.removesuffix(".weight"): list(own) for name, own in new.items()}
    extra = {**found.config.extra, TOKENS: {**named, **listed}}
    return dataclasses.replace(found, config=dataclasses.replace(found.config, extra=extra))


def with_rows_for(adapter: Adapter, names: Collection[str], rows: Mapping[str, Rows]) -> Adapter:
    """`adapter` with these `rows`, and without the carried or saved weights `names`."""
    if not names:
        return adapter
    saved = {n: values for n, values in adapter.saved.items() if n not in names}
    carried = {n: values for n, values in adapter.carried.items() if n not in names}
    config = saving_without(adapter.config, names, [*adapter.factors, *saved, *carried])
    whole = sorted(name.removesuffix(".weight") for name in names if name in adapter.saved)
    config = _excluding(config, match_targets(whole, config))
    return dataclasses.replace(adapter, saved=saved, carried=carried, rows=rows, config=config)


def same_numbers(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two arrays are equal as float32."""
    return one.shape == other.shape and bool(
        np.array_equal(one.astype(np.float32, copy=False), other.astype(np.float32, copy=False))
    )


def same_values(one: NDArray[Any] | Rows, other: NDArray[Any] | Rows) -> bool:
    """Whether two weights, or the trained rows of two weights, are equal."""
    if isinstance(one, Rows) and isinstance(other, Rows):
        return one.indices == other.indices and same_numbers(one.values, other.values)
    return not isinstance(one, Rows) and not isinstance(other, Rows) and same_numbers(one, other)


def without_idle(adapter: Adapter, modules: Container[str]) -> Adapter:
    """`adapter` without the zero factors of modules that are not in `modules`.

    Endings such as q_proj also match modules of a vision tower, whose factors stay zero if training
    saw only text. With DoRA, zero factors can still scale outputs, so they are kept.
    """
    idle = [
        name
        for name, pair in adapter.factors.items()
        if name not in modules and not pair.has_effect
    ]
    if not idle or len(idle) == len(adapter.factors):
        return adapter
    logger.info(
        "%d modules are skipped because their factors are zero (first: %s)", len(idle), idle[0]
    )
    factors = {name: pair for name, pair in adapter.factors.items() if name not in idle}
    config = _excluding(adapter.config, idle)
    return dataclasses.replace(adapter, factors=factors, config=config)


def _excluding(config: AdapterConfig, modules: Sequence[str]) -> AdapterConfig:
    """`config` that excludes `modules`, so that a model that has them does not miss their tensors.

    A regular expression of excluded modules is left as it is.
    """
    excluded = config.exclude_modules
    if not modules or isinstance(excluded, str):
        return config
    return dataclasses.replace(config, exclude_modules=(*(excluded or ()), *modules))
