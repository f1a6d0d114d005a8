"""LoRA (Hu et al., 2021, arXiv:2106.09685) on one linear layer: the layer is the equation."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from loradeploy.lora.low_rank import LowRankLayer, Shape
from loradeploy.lora.product import low_rank_linear

# nn.Linear holds its weight as [out, in], transformers' Conv1D as [in, out].
LINEAR_LAYERS = (nn.Linear, Conv1D)


class LoraLinear(LowRankLayer):
    """A frozen linear layer with one low-rank update beside it: `y = x Wᵀ + s · (x Aᵀ) Bᵀ`.

    `x` [..., in] → [..., out]; `lora_A` [rank, in], `lora_B` [out, rank].
    """

    kind = "linear"

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> tuple[Shape, Shape]:
        """[rank, in] and [out, rank]."""
        # A weight in 4 bits has a shape of its own: an nn.Linear is asked for its sizes.
        if isinstance(base, nn.Linear):
            return (rank, base.in_features), (base.out_features, rank)
        into, out = cast(Tensor, base.weight).shape
        return (rank, into), (out, rank)

    def forward(self, x: Tensor) -> Tensor:
        """As every kind's, but the plain case as one product: it is most of a training step."""
        if not self._is_plain(x):
            return super().forward(x)
        weight = self.as_matrix(cast(Tensor, self.base.weight))
        bias = cast("Tensor | None", self.base.bias)
        return low_rank_linear(x, weight, bias, *self.factors(), self.scaling)

    def _is_plain(self, x: Tensor) -> bool:
        """Whether base and update are the one equation, with nothing frozen that is trained."""
        base = self.base
        own = (base.weight, base.bias)
        return (
            type(base) in LINEAR_LAYERS
            and self.magnitude is None
            and not self.merged
            and not (self.training and self.dropout.p > 0)
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and all(type(p) is nn.Parameter and not p.requires_grad for p in own if p is not None)
            and x.dtype == base.weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """(x Aᵀ) Bᵀ."""
        return linear(linear(x.to(A.dtype), A), B)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A Conv1D's weight turned."""
        return weight.T if isinstance(self.base, Conv1D) else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """A Conv1D's weight turned back."""
        return matrix.T if isinstance(self.base, Conv1D) else matrix
