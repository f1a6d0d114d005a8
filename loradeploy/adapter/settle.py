"""What of an adapter file a base has already, or has no place for because it does nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.adapter import Adapter, Rows
from loradeploy.adapter.digest import tensors_digest
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logger_of(__name__)


def values_digest(values: NDArray[Any]) -> str:
    """The identity of one parameter's numbers, whatever the width they are stored in."""
    return tensors_digest({"": values}, {})


def without_copies(adapter: Adapter, is_own: Callable[[str, NDArray[Any]], bool]) -> Adapter:
    """`adapter` without the carried weights that the base `is_own` has as they are.

    `is_own` says of a parameter and its numbers [any shape] whether they are the base's.
    """
    carried = {n: values for n, values in adapter.carried.items() if not is_own(n, values)}
    if len(carried) == len(adapter.carried):
        return adapter
    return dataclasses.replace(adapter, carried=carried)


def same_numbers(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two arrays are equal once both are float32."""
    return one.shape == other.shape and bool(
        np.array_equal(one.astype(np.float32, copy=False), other.astype(np.float32, copy=False))
    )


def same_given(one: NDArray[Any] | Rows, other: NDArray[Any] | Rows) -> bool:
    """Whether two weights, or two weights' trained rows, are the same."""
    if isinstance(one, Rows) and isinstance(other, Rows):
        return one.indices == other.indices and same_numbers(one.values, other.values)
    return not isinstance(one, Rows) and not isinstance(other, Rows) and same_numbers(one, other)


def without_idle(adapter: Adapter, modules: Container[str]) -> Adapter:
    """`adapter` without factors that change nothing at modules that are not among `modules`.

    Endings such as q_proj reach into a vision tower too, whose factors stay zero where training saw
    text alone. With DoRA zero factors may still scale, and stay.
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
    logger.info("%d modules are left out, %s first: their factors are zero", len(idle), idle[0])
    factors = {name: pair for name, pair in adapter.factors.items() if name not in idle}
    return dataclasses.replace(adapter, factors=factors)
