"""Where rank and alpha become the scaling s, for every backend."""

from __future__ import annotations

import math

from loradeploy.adapter.config import AdapterConfig


def scaling(config: AdapterConfig, module: str) -> float:
    """s of `y = x Wᵀ + s · (x Aᵀ) Bᵀ` for `module`.

    α/r as in LoRA (Hu et al., 2021, arXiv:2106.09685, section 4.1), or α/√r with `use_rslora`
    (Kalajdzievski, 2023, arXiv:2312.03732).
    """
    rank, alpha = config.rank_of(module), config.alpha_of(module)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
