"""LoRA on a two-dimensional convolution."""

from __future__ import annotations

from typing import cast

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import conv2d

from loradeploy.lora.layers.low_rank import LowRankLayer, Shape

_GROUPED = "is a convolution of {} groups, whose update cannot be added to its weight"


class LoraConv2d(LowRankLayer):
    """A frozen convolution with a low-rank update: `y = W * x + s · B * (A * x)`.

    `x` [batch, in, height, width] → [batch, out, …]; `lora_A` [rank, in, kernel height, width]
    has the stride and padding of the base, `lora_B` [out, rank / groups, 1, 1] is a 1 × 1
    convolution. If the base has groups, A reads all inputs and B is grouped, as in PEFT; such an
    update cannot be merged.
    """

    kind = "conv2d"
    base: nn.Conv2d

    @classmethod
    def refusal(cls, base: nn.Module, rank: int, *, whole: bool) -> str | None:
        """Refuse convolutions for which PEFT's layer differs from its merged weight, or fails."""
        base = cast(nn.Conv2d, base)
        if base.dilation != (1, 1) or base.padding_mode != "zeros":
            return "is a convolution with dilation, or padding other than by zeros"
        if rank % base.groups:
            return f"is a convolution of {base.groups} groups, which do not divide the rank {rank}"
        if whole and base.groups > 1:
            return _GROUPED.format(base.groups) + ": only standard LoRA is supported"
        return None

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> tuple[Shape, Shape]:
        """[rank, in, height, width] and [out, rank / groups, 1, 1]."""
        base = cast(nn.Conv2d, base)
        kernel = (rank, base.in_channels, *base.kernel_size)
        return kernel, (base.out_channels, rank // base.groups, 1, 1)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """B * (A * x)."""
        narrow = conv2d(x.to(A.dtype), A, None, self.base.stride, self.base.padding)
        return conv2d(narrow, B, groups=self.base.groups)

    @torch.no_grad()
    def initialize(self, method: bool | str, generator: Generator) -> None:
        """As for other layers. For a grouped convolution, only A is initialized, and B is zero."""
        if self.base.groups == 1:
            super().initialize(method, generator)
            return
        shape = self.lora_A.flatten(1)  # [rank, in · height · width], as of an ungrouped weight
        A, _ = self.initialization_of(method)(shape, self.rank, self.scaling, generator)
        self.lora_A.copy_(A.view_as(self.lora_A))

    def as_matrix(self, weight: Tensor) -> Tensor:
        """[out, in, height, width] → [out, in · height · width]."""
        return weight.flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """[out, in · height · width] → [out, in, height, width]."""
        return matrix.reshape(self.base.weight.shape)

    def along_outputs(self, values: Tensor) -> Tensor:
        """[out] → [out, 1, 1]."""
        return values.view(-1, 1, 1)

    def unmergeable(self) -> str | None:
        """With groups, A reads the inputs of all groups, which a grouped weight cannot."""
        return _GROUPED.format(self.base.groups) if self.base.groups > 1 else None
