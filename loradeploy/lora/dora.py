"""DoRA's norm in PyTorch (Liu et al., 2024, arXiv:2402.09353); `adapter.dora` has it in numpy."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def row_norms(W: Tensor, squares: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """‖W + s · B A‖ of every row: float32 [out], a constant to the gradient (section 4.3).

    `W` [out, in], `squares` [out] = ‖W‖² of its rows, `A` [rank, in], `B` [out, rank], float32.
    By ‖w + s · b A‖² = ‖w‖² + 2 s · b·(A w) + s² · b (A Aᵀ) bᵀ nothing as large as W is made.
    """
    with torch.autocast(W.device.type, enabled=False):  # which would round the products to 8 bits
        crossed = (B * (W @ A.T)).sum(dim=1)
        own = (B * (B @ (A @ A.T))).sum(dim=1)
    return (squares + 2 * s * crossed + s * s * own).clamp_min(0).sqrt()
