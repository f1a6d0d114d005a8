"""LoRA on a linear layer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from loradeploy.lora.layers.low_rank import LowRankLayer, Shape
from loradeploy.lora.layers.product import LowRank, low_rank_linears
from loradeploy.lora.layers.targets import LINEAR_LAYERS


class LoraLinear(LowRankLayer):
    """A frozen linear layer with a low-rank update: `y = x Wᵀ + s · (x Aᵀ) Bᵀ`.

    `x` [..., in] → [..., out]; `lora_A` [rank, in], `lora_B` [out, rank].
    """

    kind = "linear"

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> tuple[Shape, Shape]:
        """[rank, in] and [out, rank]."""
        # A 4-bit weight is stored in another shape, so the sizes are those of the nn.Linear.
        if isinstance(base, nn.Linear):
            return (rank, base.in_features), (base.out_features, rank)
        inputs, outputs = cast(Tensor, base.weight).shape
        return (rank, inputs), (outputs, rank)

    def forward(self, x: Tensor) -> Tensor:
        """The output, in one fused product in the usual case, which dominates a training step."""
        product = self.product(x)
        return super().forward(x) if product is None else low_rank_linears(x, [product])[0]

    def product(self, x: Tensor) -> LowRank | None:
        """The operands of `low_rank_linears` if it computes what this layer does for `x`."""
        if not self._is_one_product(x):
            return None
        weight = self.as_matrix(cast(Tensor, self.base.weight))
        bias = cast("Tensor | None", self.base.bias)
        return LowRank(weight, bias, *self.factors(), self.scaling)

    def _is_one_product(self, x: Tensor) -> bool:
        """Whether the layer is one product for `x`: no dropout, DoRA, hooks, autocast, …"""
        base = self.base
        frozen = (base.weight, base.bias)
        return (
            type(base) in LINEAR_LAYERS
            and self.magnitude is None
            and self.lora_bias is None
            and not self.merged
            and not (self.training and self.dropout.p > 0)
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and all(
                type(p) is nn.Parameter and not p.requires_grad for p in frozen if p is not None
            )
            and x.dtype == base.weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """(x Aᵀ) Bᵀ."""
        return linear(linear(x.to(A.dtype), A), B)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The weight of a Conv1D, transposed; others unchanged."""
        return weight.T if isinstance(self.base, Conv1D) else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of `as_matrix`."""
        return matrix.T if isinstance(self.base, Conv1D) else matrix
