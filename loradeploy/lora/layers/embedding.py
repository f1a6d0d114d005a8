"""LoRA on an embedding."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import linear

from loradeploy.lora.layers.initialize import Initialization, embedding
from loradeploy.lora.layers.low_rank import LowRankLayer, Shape


class LoraEmbedding(LowRankLayer):
    """A frozen embedding with a low-rank update: `y = W[x] + s · Aᵀ[x] Bᵀ`.

    `x` integers [...] → [..., size]; `lora_A` [rank, vocabulary], `lora_B` [size, rank]. An output
    head that is tied to the embedding does not change. Dropout does not apply to token ids.
    """

    kind = "embedding"
    drops = False
    base: nn.Embedding

    @classmethod
    def refusal(cls, base: nn.Module, rank: int, *, whole: bool) -> str | None:
        """With max_norm, an embedding has no fixed weight: reading a vector rescales it."""
        if getattr(base, "max_norm", None) is not None:
            return "is an embedding with max_norm, which changes its weight when it is read"
        return None

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> tuple[Shape, Shape]:
        """[rank, vocabulary] and [size, rank]."""
        vocabulary, size = cast(Tensor, base.weight).shape
        return (rank, vocabulary), (size, rank)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Aᵀ[x] Bᵀ, multiplied by the embedding scale of some models (Gemma)."""
        update = linear(nn.functional.embedding(x, A.T, padding_idx=self.base.padding_idx), B)
        factor = getattr(self.base, "embed_scale", None)
        return update if factor is None else update * factor

    def initialization_of(self, method: bool | str) -> Initialization:
        """Unless the method initializes from the base's weight, A is zero instead of B."""
        return embedding if method in (True, "gaussian") else super().initialization_of(method)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """[vocabulary, size] → [size, vocabulary]."""
        return weight.T

    def as_weight(self, matrix: Tensor) -> Tensor:
        """[size, vocabulary] → [vocabulary, size]."""
        return matrix.T
