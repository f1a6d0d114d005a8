"""The arithmetic of LoRA layers in one autograd function: `y = x Wᵀ + b + s · (x Aᵀ) Bᵀ`.

As separate operations, the update takes three passes over a tensor of the size of `y`, and in the
backward pass as many over one of the size of `x`. Here the matrix product of the last term also
computes the sum, and x Aᵀ [tokens, rank] is the only intermediate saved for the backward pass.
Layers with the same input share the product with their As, and the sum of the gradients of `x`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


@dataclass(frozen=True, eq=False)
class LowRank:
    """A frozen linear layer and its update, with the symbols of the equation.

    `W` [out, in] and `b` [out] get no gradients. `A` [rank, in] and `B` [out, rank] get gradients
    and may have a wider dtype than W, in which the update is computed and added.
    """

    W: Tensor
    b: Tensor | None
    A: Tensor
    B: Tensor
    s: float

    def output(self, rows: Tensor, low: Tensor) -> Tensor:
        """y [tokens, out] of `rows` [tokens, in] and `low` = x Aᵀ [tokens, rank]."""
        y = linear(rows, self.W, self.b)
        if y.dtype == low.dtype:
            return y.addmm_(low, self.B.T, alpha=self.s)
        return torch.addmm(y.to(low.dtype), low, self.B.T, alpha=self.s).to(y.dtype)

    def slope_of_low(self, dy: Tensor) -> Tensor:
        """The gradient of x Aᵀ, from that of y: [tokens, rank]."""
        return (dy.to(self.B.dtype) @ self.B).mul_(self.s)

    def outer_slope(self, low: Tensor, dy: Tensor) -> Tensor:
        """The gradient of B, from that of y."""
        # Faster on a CPU than dyᵀ low.
        return (low.T @ dy.to(self.B.dtype)).mul_(self.s).T


def low_rank_linears(x: Tensor, layers: Sequence[LowRank]) -> tuple[Tensor, ...]:
    """The outputs [..., out] of `layers` for `x` [..., in], in the dtype of `x` and of each W.

    All A and B have the same dtype.
    """
    tensors = [tensor for layer in layers for tensor in (layer.W, layer.b, layer.A, layer.B)]
    scalings = [layer.s for layer in layers]
    rows = x.reshape(-1, x.shape[-1])  # [tokens, in]
    ys = _LowRankLinears.apply(rows, scalings, *tensors)  # type: ignore[no-untyped-call]
    # Models may change outputs in place, which autograd refuses for views that a function returns.
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def add_product(y: Tensor, narrow: Tensor, wide: Tensor) -> Tensor:
    """`y` + `narrow` · `wide` in their dtype, in the memory of `y` if it has this dtype."""
    if y.dtype == narrow.dtype:
        return y.addmm_(narrow, wide)
    return torch.addmm(y.to(narrow.dtype), narrow, wide).to(y.dtype)


def _layers(scalings: Sequence[float], tensors: Sequence[Any]) -> list[LowRank]:
    operands = zip(*(tensors[i::4] for i in range(4)), scalings, strict=True)
    return [LowRank(W, b, A, B, s) for W, b, A, B, s in operands]


def _stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


class _LowRankLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, scalings: list[float], *tensors: Any) -> tuple[Tensor, ...]:
        layers = _layers(scalings, tensors)
        As = _stacked([layer.A for layer in layers])  # [Σ rank, in]
        lows = rows.to(As.dtype) @ As.T  # [tokens, Σ rank]
        ctx.save_for_backward(rows, lows, *tensors)
        ctx.scalings = scalings
        parts = torch.split(lows, [len(layer.A) for layer in layers], dim=1)
        return tuple(layer.output(rows, low) for layer, low in zip(layers, parts, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        rows, lows, *tensors = ctx.saved_tensors
        layers = _layers(ctx.scalings, tensors)
        ranks = [len(layer.A) for layer in layers]
        pairs = list(zip(layers, dys, strict=True))
        dlows = _stacked([layer.slope_of_low(dy) for layer, dy in pairs], dim=1)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dys[0] @ layers[0].W  # [tokens, in]
            for layer, dy in pairs[1:]:
                dx.addmm_(dy, layer.W)
            dx = add_product(dx, dlows, _stacked([layer.A for layer in layers]))
        slopes: list[Tensor | None] = []
        dAs = torch.split(dlows.T @ rows.to(dlows.dtype), ranks)
        for (layer, dy), low, dA in zip(pairs, torch.split(lows, ranks, dim=1), dAs, strict=True):
            slopes += [None, None, dA, layer.outer_slope(low, dy)]
        return dx, None, *slopes
