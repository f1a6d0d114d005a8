"""The arithmetic of a LoRA layer in one autograd function: `y = x Wᵀ + b + s · (x Aᵀ) Bᵀ`.

As separate operations, the update takes three passes over a tensor of the size of `y`, and in the
backward pass as many over one of the size of `x`. Here the matrix product of the last term also
computes the sum, and x Aᵀ [tokens, rank] is the only intermediate saved for the backward pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """`x` [..., in] → [..., out], in the dtype of `x` and of the frozen `weight` [out, in].

    `lora_A` [rank, in] and `lora_B` [out, rank] get gradients and may have a wider dtype than
    `weight`, in which the update is computed and added. `weight` and `bias` get no gradients.
    """
    y = _LowRankLinear.apply(x, weight, bias, lora_A, lora_B, scaling)  # type: ignore[no-untyped-call]
    return cast(Tensor, y)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [tokens, in]
        y = linear(rows, W, b)  # [tokens, out]
        low = rows.to(A.dtype) @ A.T  # [tokens, rank]
        if y.dtype == A.dtype:
            y.addmm_(low, B.T, alpha=s)
        else:
            y = torch.addmm(y.to(A.dtype), low, B.T, alpha=s).to(y.dtype)
        ctx.save_for_backward(rows, W, A, B, low)
        ctx.s = s
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, W, A, B, low = ctx.saved_tensors
        (dy,) = gradients
        x_shape = (*dy.shape[:-1], W.shape[1])
        dy = dy.reshape(-1, W.shape[0])  # [tokens, out]
        wide = dy.to(A.dtype)
        dlow = (wide @ B).mul_(ctx.s)  # [tokens, rank]
        dx = dA = dB = None
        if ctx.needs_input_grad[0]:
            dx = dy @ W  # [tokens, in]
            if dx.dtype == A.dtype:
                dx.addmm_(dlow, A)
            else:
                dx = torch.addmm(dx.to(A.dtype), dlow, A).to(dx.dtype)
            dx = dx.view(x_shape)
        if ctx.needs_input_grad[3]:
            dA = dlow.T @ rows.to(A.dtype)
        if ctx.needs_input_grad[4]:
            dB = (low.T @ wide).mul_(ctx.s).T  # faster on a CPU than wide.T @ low
        return dx, None, None, dA, dB, None
