"""Pooling of a text's states in PyTorch, as in `bundle.text.vectors.pooling` in numpy.

Each function takes states [batch, sequence, hidden] float32 and a mask [batch, sequence] int64 with
padding on the right, and returns [batch, hidden].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor


def _weighted(states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    weights = weights.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1), weights.sum(1).clamp(min=1e-9)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    total, count = _weighted(states, mask)
    return total / count


def _mean_sqrt(states: Tensor, mask: Tensor) -> Tensor:
    total, count = _weighted(states, mask)
    return total / count.sqrt()


def _weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    total, weight = _weighted(states, mask * positions)
    return total / weight


def _max(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(1)


def _cls(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device), mask.argmax(1)]


def _last(states: Tensor, mask: Tensor) -> Tensor:
    end = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return states[torch.arange(len(states), device=states.device), end]


POOLS: Final[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


def pooled(states: Tensor, mask: Tensor, modes: tuple[str, ...]) -> Tensor:
    """The vectors of all `modes`, concatenated: [batch, modes · hidden]."""
    return torch.cat([POOLS[mode](states, mask) for mode in modes], dim=-1)
