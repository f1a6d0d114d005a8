"""The pooling modes of sentence-transformers, which compute one vector from a text's states.

Each function takes states [batch, sequence, hidden] float32 and a mask [batch, sequence] int64 with
padding on the right, and returns [batch, hidden] float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


def _cls(states: Floats, mask: NDArray[np.int64]) -> Floats:
    first: Floats = states[np.arange(len(states)), mask.argmax(axis=1)]
    return first


def _last(states: Floats, mask: NDArray[np.int64]) -> Floats:
    end = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    last: Floats = states[np.arange(len(states)), end] * mask.any(axis=1, keepdims=True)
    return last


def _max(states: Floats, mask: NDArray[np.int64]) -> Floats:
    largest: Floats = np.where(mask[:, :, np.newaxis] != 0, states, -np.inf).max(axis=1)
    return largest.astype(np.float32)


def _sum(states: Floats, weights: NDArray[Any]) -> tuple[Any, Any]:
    weights = weights.astype(np.float32)[:, :, np.newaxis]
    return (states * weights).sum(axis=1), np.maximum(weights.sum(axis=1), 1e-9)


def _mean(states: Floats, mask: NDArray[np.int64]) -> Floats:
    total, count = _sum(states, mask)
    mean: Floats = total / count
    return mean


def _mean_sqrt(states: Floats, mask: NDArray[np.int64]) -> Floats:
    total, count = _sum(states, mask)
    mean: Floats = total / np.sqrt(count)
    return mean


def _weighted_mean(states: Floats, mask: NDArray[np.int64]) -> Floats:
    # Weighted by position, from 1: later tokens of a decoder attend to more tokens.
    total, weight = _sum(states, mask * np.arange(1, mask.shape[1] + 1))
    mean: Floats = total / weight
    return mean


POOLS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
