"""LoRA (Hu et al., 2021, arXiv:2106.09685) on one linear layer: the layer is the equation."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

# nn.Linear holds its weight as [out, in], transformers' Conv1D as [in, out].
LINEAR_LAYERS = (nn.Linear, Conv1D)


def features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    rows, columns = cast(Tensor, layer.weight).shape
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)


class LoraLinear(nn.Module):
    """A frozen linear layer with one low-rank update beside it: `y = x Wᵀ + s · (x Aᵀ) Bᵀ`.

    `lora_A` [rank, in] and `lora_B` [out, rank] are float32 parameters, whatever the width of the
    base; `scaling` is s. Dropout is on the input of the low-rank path, as in section 5 of the
    paper's appendix D. Nothing is merged but by `merge`.
    """

    def __init__(self, base: nn.Module, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        into, out = features(base)
        device = cast(Tensor, base.weight).device
        self.base = base
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.zeros(rank, into, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, device=device))
        self._unmerged: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] → [..., out], in the dtype of the base's result."""
        y: Tensor = self.base(x)
        if self.merged:
            return y
        x = self.dropout(x.to(self.lora_A.dtype))
        update = linear(linear(x, self.lora_A), self.lora_B)  # (x Aᵀ) Bᵀ
        return (y + self.scaling * update).to(y.dtype)

    def initialise(self, generator: torch.Generator) -> None:
        """A Kaiming-uniform and B zero, so that training starts at the base (section 4.1)."""
        fresh = torch.empty(self.lora_A.shape)
        nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(fresh)
            self.lora_B.zero_()

    @property
    def merged(self) -> bool:
        """Whether the update is in the base's weight at present."""
        return self._unmerged is not None

    def merge(self) -> None:
        """Fold s · B A into the base's weight, in float32 with one final cast.

        The weight becomes a parameter of this layer alone: one that is tied to another module's
        leaves that module as it is. The original is kept, so that `unmerge` is exact.
        """
        if self.merged:
            return
        weight = cast(nn.Parameter, self.base.weight)
        delta = self.scaling * (self.lora_B.float() @ self.lora_A.float())  # [out, in]
        if isinstance(self.base, Conv1D):
            delta = delta.T
        merged = (weight.detach().float() + delta.detach()).to(weight.dtype)
        self._unmerged = weight
        self.base.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Put the base's weight back, bit for bit."""
        if self._unmerged is not None:
            self.base.weight = self._unmerged
            self._unmerged = None

    @property
    def weight(self) -> Tensor:
        """The base's weight, for models that read it."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, for models that read it."""
        return cast("Tensor | None", self.base.bias)
