"""One vector of a text's states in PyTorch, as `bundle.text.pooling` computes it in numpy.

Each takes states [batch, sequence, hidden] float32 and a mask [batch, sequence] int64, in which
padding is on the right, and gives [batch, hidden].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from loradeploy.bundle.text.sentence import read_recipe, recipe_directory
from loradeploy.errors import BundleError


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
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    total, weight = _weighted(states, mask * places)
    return total / weight


def _max(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(1)


def _cls(states: Tensor, mask: Tensor) -> Tensor:
    return states[:, 0]


def _last(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]


POOLS: Final[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


def pooled(states: Tensor, mask: Tensor, modes: tuple[str, ...]) -> Tensor:
    """The vectors of all `modes` side by side, [batch, modes · hidden]."""
    return torch.cat([POOLS[mode](states, mask) for mode in modes], dim=-1)


@dataclass(frozen=True)
class Pooling:
    """How an embedder is trained. `of_base`: whether it is what the base's modules.json specifies.

    `modes`: as in `bundle.text.pooling`.
    """

    modes: tuple[str, ...] = ("mean",)
    of_base: bool = True


def pooling_of(base: Path) -> Pooling:
    """The pooling to train with on the model in `base`.

    That of its modules.json, the mean where there is none. The mean also where more is specified
    than training computes: layers on the pooled vector, lowercased texts, a default prompt.
    """
    try:
        found = recipe_directory(base)
        recipe = None if found is None else read_recipe(found)
    except BundleError:  # a module of another kind
        return Pooling(of_base=False)
    if recipe is None:
        return Pooling()
    # Without a default prompt there is no prompt to pool or to leave out.
    scales = dataclasses.replace(recipe, include_prompt=True).only_scales
    if scales and not recipe.lowercase and recipe.default_prompt is None:
        return Pooling(recipe.pooling)
    return Pooling(of_base=False)
