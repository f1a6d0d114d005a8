"""Rank and alpha to the scaling s, for every backend, and the inverse."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

from loradeploy.adapter.config import AdapterConfig

_Number = TypeVar("_Number", int, float)


def scaling(config: AdapterConfig, module: str) -> float:
    """s of `y = x Wᵀ + s · (x Aᵀ) Bᵀ` for `module`.

    α/r as in LoRA (Hu et al., 2021, arXiv:2106.09685, section 4.1), or α/√r with `use_rslora`
    (Kalajdzievski, 2023, arXiv:2312.03732).
    """
    rank, alpha = config.rank_of(module), config.alpha_of(module)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def with_ranks(
    config: AdapterConfig, ranks: Mapping[str, int], scalings: Mapping[str, float]
) -> AdapterConfig:
    """`config` with these ranks and scalings s by module.

    The most common ones become `r` and `lora_alpha`, the others patterns.
    """
    alphas = {
        module: scalings[module] * (math.sqrt(rank) if config.use_rslora else rank)
        for module, rank in ranks.items()
    }
    r = _most_common(ranks, config.r)
    alpha = _most_common(alphas, config.lora_alpha)
    return dataclasses.replace(
        config,
        r=int(r),
        lora_alpha=alpha,
        rank_pattern=_patterns(config, ranks, r),
        alpha_pattern=_patterns(config, alphas, alpha),
    )


def _most_common(values: Mapping[str, float], default: float) -> float:
    return Counter(values.values()).most_common(1)[0][0] if values else default


def _patterns(
    config: AdapterConfig, values: Mapping[str, _Number], default: float
) -> dict[str, _Number]:
    # Without ^, PEFT would also match longer names with this ending.
    return {
        f"^{re.escape(config.targeted_name(module))}": value
        for module, value in sorted(values.items())
        if value != default
    }
