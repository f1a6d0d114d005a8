"""RMSNorm and the gated activation of MLPs in few passes over memory, for training on a CPU.

PyTorch computes both as several operations, each of which reads and writes the whole tensor, and
keeps intermediate results for the backward pass. Here a few rows at a time go through all
operations while they are in the cache, and only the inputs are kept. So the gated activation, which
is the input of the layer `down_proj`, is computed a second time in the backward pass of this layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loradeploy.lora.layers.product import LowRank, add_product

# Rows in the cache at a time; of 64, 128 and 256, this was the fastest for RMSNorm.
_ROWS: Final = 128


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`weight · x / √(mean(x²) + epsilon)` over the last dimension of `x` [..., size].

    `weight` [size] is frozen. Both are float32 or float64.
    """
    y: Tensor = _RmsNorm.apply(_rows(x), weight, epsilon)  # type: ignore[no-untyped-call]
    return y.view(x.shape)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) · up`, of one shape and dtype; bit for bit as in separate operations."""
    y: Tensor = _GatedSilu.apply(_rows(gate), _rows(up))  # type: ignore[no-untyped-call]
    return y.view(gate.shape)


def gated_low_rank_linear(gate: Tensor, up: Tensor, layer: LowRank) -> Tensor:
    """`layer` of `silu(gate) · up` [..., in] → [..., out]; all of one dtype, on a CPU."""
    operands = (layer.W, layer.b, layer.A, layer.B, layer.s)
    y: Tensor = _GatedLinear.apply(_rows(gate), _rows(up), *operands)  # type: ignore[no-untyped-call]
    return y.view(*gate.shape[:-1], y.shape[-1])


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x · cos + rotate_half(x) · sin` (RoPE) for `x` [..., tokens, heads, size].

    `cos` and `sin` [..., tokens, size] get no gradients. rotate_half(x) is (−x₂, x₁) for the two
    halves x₁ and x₂ of each head.
    """
    return cast(Tensor, _Rotated.apply(x, cos, sin))  # type: ignore[no-untyped-call]


def _in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, _ROWS) for tensor in tensors), strict=True)


def _rows(tensor: Tensor) -> Tensor:
    """[rows, size]. The functions return rows, too.

    Models may change an output in place, which autograd refuses for views that a function returns.
    """
    return tensor.reshape(-1, tensor.shape[-1])


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, w: Tensor, epsilon: float) -> Tensor:
        norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        r = norms.square_().div_(rows.shape[1]).add_(epsilon).rsqrt_()  # [rows, 1]
        y = torch.empty_like(rows)
        for some_x, some_r, some_y in _in_chunks(rows, r, y):
            torch.mul(some_x, some_r, out=some_y).mul_(w)
        ctx.save_for_backward(rows, w, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, w, r = ctx.saved_tensors
        dx = torch.empty_like(rows)
        buffer = torch.empty_like(rows[:_ROWS])
        # dx = r · w · dy − x · r³ · mean(w · dy · x)
        for some_x, some_r, some_dy, some_dx in _in_chunks(rows, r, dy, dx):
            torch.mul(some_dy, w, out=some_dx)
            product = torch.mul(some_dx, some_x, out=buffer[: len(some_x)])
            c = product.mean(dim=-1, keepdim=True).mul_(some_r**3)
            some_dx.mul_(some_r).addcmul_(some_x, c, value=-1)
        return dx, None, None


def _activation(g: Tensor, u: Tensor) -> Tensor:
    h = torch.empty_like(g)
    for some_g, some_u, some_h in _in_chunks(g, u, h):
        torch.ops.aten.silu.out(some_g, out=some_h)
        some_h.mul_(some_u)
    return h


def _activation_slopes(
    g: Tensor, u: Tensor, dh: Tensor, dlow: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of gate and up, and that of A, dlowᵀ h, if `dlow` is given."""
    dg, du = torch.empty_like(g), torch.empty_like(u)
    buffer = torch.empty_like(g[:_ROWS])
    dA = None if dlow is None else g.new_zeros((dlow.shape[1], g.shape[1]))
    lows = dh[:, :0] if dlow is None else dlow
    for some_g, some_u, some_dh, some_dg, some_du, low in _in_chunks(g, u, dh, dg, du, lows):
        some = buffer[: len(some_g)]
        slope = torch.mul(some_dh, some_u, out=some)
        torch.ops.aten.silu_backward.grad_input(slope, some_g, grad_input=some_dg)
        torch.ops.aten.silu.out(some_g, out=some_du)
        if dA is not None:
            dA.addmm_(low.T, torch.mul(some_du, some_u, out=some))
        some_du.mul_(some_dh)
    return dg, du, dA


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return _activation(g, u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        g, u = ctx.saved_tensors
        dg, du, _ = _activation_slopes(g, u, dh)
        return dg, du


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, *operands: Any) -> Tensor:
        layer = LowRank(*operands)
        h = _activation(g, u)
        low = h @ layer.A.T  # [tokens, rank]
        ctx.save_for_backward(g, u, low, *operands[:-1])
        ctx.s = layer.s
        return layer.output(h, low)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        g, u, low, W, b, A, B = ctx.saved_tensors
        layer = LowRank(W, b, A, B, ctx.s)
        dlow = layer.slope_of_low(dy)
        dh = add_product(dy @ layer.W, dlow, layer.A)
        dg, du, dA = _activation_slopes(g, u, dh, dlow)
        return dg, du, None, None, dA, layer.outer_slope(low, dy), None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for x1, x2, y1, y2, c1, c2, s1, s2 in _halves(x, y, cos, sin):
            torch.mul(x1, c1, out=y1).addcmul_(x2, s1, value=-1)
            torch.mul(x2, c2, out=y2).addcmul_(x1, s2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
        for dy1, dy2, dx1, dx2, c1, c2, s1, s2 in _halves(dy, dx, *ctx.saved_tensors):
            torch.mul(dy1, c1, out=dx1).addcmul_(dy2, s2)
            torch.mul(dy2, c2, out=dx2).addcmul_(dy1, s1, value=-1)
        return dx, None, None


def _halves(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The halves of each head, in chunks of tokens: of `x`, `y`, `cos` and `sin`."""
    heads = x.flatten(0, -3), y.flatten(0, -3)  # [tokens, heads, size]
    turns = (t.expand(*x.shape[:-2], -1).flatten(0, -2)[:, None] for t in (cos, sin))
    for some in _in_chunks(*heads, *turns):
        yield tuple(half for tensor in some for half in tensor.chunk(2, dim=-1))
