"""Remove from an adapter copies of base weights, and zero factors of modules the base lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.adapter import Adapter, Rows
from loradeploy.adapter.files.digest import tensors_digest
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logger_of(__name__)

TOKENS: Final = "trainable_token_indices"  # of PEFT's config


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
    adapter: Adapter, values_of: Callable[[str], NDArray[Any] | None], most: int
) -> Adapter:
    """`adapter` with the carried weights of few other rows than the base's as trained rows.

    `values_of`: the base's values of a parameter, None where they are not known. `most`: so many
    rows of a weight may differ. PEFT saves the whole embedding where words were added in its spare
    rows.
    """
    known = adapter.config.extra.get(TOKENS)
    indices = dict(known) if isinstance(known, Mapping) else {}
    rows, carried = dict(adapter.rows), dict(adapter.carried)
    for name, values in adapter.carried.items() if known is None or indices else ():
        own = values_of(name)
        if own is None or own.shape != values.shape or values.ndim != 2 or name in rows:
            continue
        apart = np.flatnonzero((own.astype(np.float32) != values.astype(np.float32)).any(axis=1))
        if 0 < len(apart) <= most:
            rows[name] = Rows(tuple(apart.tolist()), values[apart])
            indices[name.removesuffix(".weight")] = apart.tolist()
            del carried[name]
    if len(rows) == len(adapter.rows):
        return adapter
    config = adapter.config
    config = dataclasses.replace(config, extra={**config.extra, TOKENS: indices})
    return dataclasses.replace(adapter, rows=rows, carried=carried, config=config)


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
    saw only text. With DoRA zero factors can still scale outputs, and are kept.
    """
    idle = [
        name
        for name, pair in adapter.factors.items()
        if name not in modules
        and pair.magnitude is None
        and not (np.any(pair.A) and np.any(pair.B))
    ]
    if not idle or len(idle) == len(adapter.factors):
        return adapter
    logger.info(
        "%d modules are skipped because their factors are zero (first: %s)", len(idle), idle[0]
    )
    factors = {name: pair for name, pair in adapter.factors.items() if name not in idle}
    config, excluded = adapter.config, adapter.config.exclude_modules
    if excluded is None or isinstance(excluded, tuple):  # a model that has them lacks no tensors
        config = dataclasses.replace(config, exclude_modules=(*(excluded or ()), *idle))
    return dataclasses.replace(adapter, factors=factors, config=config)
