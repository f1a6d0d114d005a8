"""Techniques of Unsloth that run on a CPU, on a PEFT model of the Llama architecture.

Unsloth itself needs a GPU. Written after its published design, with PyTorch in place of Triton:

- one autograd function for q, k and v, one for the MLP and one for the output projection, with
  backward passes by hand that add into one gradient of the input; x Aᵀ and the MLP's inner product
  are computed again instead of stored;
- RoPE and RMSNorm as one function each;
- causal attention without a mask: padding is on the right, and has no labels;
- logits in chunks, with the gradient of the hidden states computed at once, so that none is stored.

Its offloading of activations, which trades time for memory, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers import Trainer

from loradeploy.train.fusion.elementwise import rms_norm

_ADAPTER: Final = "default"
_CHUNK: Final = 512  # rows of logits


class UnslothTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is computed from the hidden states, without stored logits."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        """The mean of the cross-entropy over the labeled tokens."""
        decoder = model.get_base_model()
        hidden = decoder.model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
        labels = inputs["labels"][:, 1:].flatten()
        apply: Any = _ChunkedLoss.apply
        return apply(hidden[:, :-1].flatten(0, 1), decoder.lm_head.weight, labels)


def patch(model: Any) -> Any:
    """Replace the forward passes of a PEFT model's layers; returns the model."""
    for layer in model.get_base_model().model.layers:
        layer.self_attn.forward = _attention(layer.self_attn)
        layer.mlp.forward = _mlp(layer.mlp)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = _norm(module)
    return model


def _norm(module: Any) -> Any:
    return lambda x: rms_norm(x, module.weight, module.variance_epsilon)


def _weights(layer: Any) -> tuple[Tensor, Tensor, Tensor, float]:
    """W [out, in], A [rank, in], B [out, rank] and the scaling of a PEFT layer."""
    A, B = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    return layer.base_layer.weight, A, B, layer.scaling[_ADAPTER]


def _attention(attention: Any) -> Any:
    size = attention.head_dim

    def forward(hidden_states: Tensor, position_embeddings: Any, **_: Any) -> tuple[Tensor, None]:
        batch, length, _width = hidden_states.shape
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (
            y.view(batch, length, -1, size).transpose(1, 2)
            for y in _projections(hidden_states, layers)
        )
        cos, sin = (part[:, None] for part in position_embeddings)
        rotate: Any = _Rotation.apply
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        (output,) = _projections(y.transpose(1, 2).reshape(batch, length, -1), (attention.o_proj,))
        return output, None

    return forward


def _mlp(mlp: Any) -> Any:
    def forward(x: Tensor) -> Any:
        parts = [_weights(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        scalings = [part[3] for part in parts]
        apply: Any = _Mlp.apply
        return apply(x, scalings, *(tensor for part in parts for tensor in part[:3]))

    return forward


def _projections(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
    parts = [_weights(layer) for layer in layers]
    scalings = [part[3] for part in parts]
    apply: Any = _Projections.apply
    found: tuple[Tensor, ...] = apply(
        x, scalings, *(tensor for part in parts for tensor in part[:3])
    )
    return found


def _product(x: Tensor, layer: Sequence[Tensor], s: float) -> Tensor:
    W, A, B = layer
    return linear(x, W).addmm_(x @ A.T, B.T, alpha=s)


def _add_input_gradient(dx: Tensor, dy: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> None:
    dx.addmm_(dy, W).addmm_(dy @ B, A, alpha=s)


def _factor_gradients(x: Tensor, dy: Tensor, A: Tensor, B: Tensor, s: float) -> list[Tensor]:
    return [((dy @ B).T @ x).mul_(s), (dy.T @ (x @ A.T)).mul_(s)]


class _Projections(torch.autograd.Function):
    """Several LoRA layers of one input; `tensors`: W, A and B of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: list[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        rows = x.flatten(0, -2)
        ctx.save_for_backward(rows, *tensors)
        ctx.scalings = scalings
        return tuple(
            _product(rows, tensors[3 * n : 3 * n + 3], s).view(*x.shape[:-1], -1)
            for n, s in enumerate(scalings)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        rows, *tensors = ctx.saved_tensors
        dx = torch.zeros_like(rows)
        found: list[Any] = []
        for n, (s, gradient) in enumerate(zip(ctx.scalings, gradients, strict=True)):
            W, A, B = tensors[3 * n : 3 * n + 3]
            dy = gradient.reshape(len(rows), -1)
            _add_input_gradient(dx, dy, W, A, B, s)
            found += [None, *_factor_gradients(rows, dy, A, B, s)]
        return dx.view(*gradients[0].shape[:-1], -1), None, *found


class _Mlp(torch.autograd.Function):
    """down(silu(gate(x)) · up(x)); `tensors`: W, A and B of gate, up and down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: list[float], *tensors: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        gate = _product(rows, tensors[:3], scalings[0])
        up = _product(rows, tensors[3:6], scalings[1])
        ctx.save_for_backward(rows, gate, up, *tensors)
        ctx.scalings = scalings
        return _product(silu(gate).mul_(up), tensors[6:], scalings[2]).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        rows, gate, up, *tensors = ctx.saved_tensors
        dy = gradients[0].reshape(len(rows), -1)
        Wd, Ad, Bd = tensors[6:]
        gated = silu(gate)
        dh = (dy @ Wd).addmm_(dy @ Bd, Ad, alpha=ctx.scalings[2])
        down = _factor_gradients(gated * up, dy, Ad, Bd, ctx.scalings[2])
        dup = gated.mul_(dh)
        dgate = torch.ops.aten.silu_backward(dh.mul_(up), gate)
        dx = torch.zeros_like(rows)
        found: list[Any] = []
        for n, slope in enumerate((dgate, dup)):
            W, A, B = tensors[3 * n : 3 * n + 3]
            _add_input_gradient(dx, slope, W, A, B, ctx.scalings[n])
            found += [None, *_factor_gradients(rows, slope, A, B, ctx.scalings[n])]
        return dx.view(gradients[0].shape), None, *found, None, *down


class _Rotation(torch.autograd.Function):
    """Rotary positions: halves (a, b) become (a cos − b sin, b cos + a sin)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x.clone(), cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0].clone(), cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    before = a.clone()
    a.mul_(cos[..., :half]).addcmul_(b, sin[..., :half], value=-1)
    b.mul_(cos[..., half:]).addcmul_(before, sin[..., half:])
    return x


class _ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of `hidden Wᵀ` at the labels; the gradient is computed with each chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, W: Tensor, labels: Tensor) -> Tensor:
        counted = labels != -100
        gradient, total = torch.empty_like(hidden), torch.zeros(())
        for begin in range(0, len(labels), _CHUNK):
            rows = slice(begin, begin + _CHUNK)
            logits = linear(hidden[rows], W)
            at = labels[rows, None].clamp(min=0)
            normalizer = logits.logsumexp(-1, keepdim=True)
            total += ((normalizer - logits.gather(-1, at))[:, 0] * counted[rows]).sum()
            slope = logits.sub_(normalizer).exp_()
            slope.scatter_add_(-1, at, torch.full_like(at, -1, dtype=slope.dtype))
            torch.mm(slope.mul_(counted[rows, None]), W, out=gradient[rows])
        ctx.save_for_backward(gradient.div_(counted.sum()))
        return total / counted.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None
