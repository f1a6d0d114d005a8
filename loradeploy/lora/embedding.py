"""LoRA (Hu et al., 2021, arXiv:2106.09685) on an embedding."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import linear

from loradeploy.lora.initialize import Initialization, embedding
from loradeploy.lora.low_rank import LowRankLayer, Shape


class LoraEmbedding(LowRankLayer):
    """A frozen embedding with one low-rank update beside it: `y = W[x] + s · Aᵀ[x] Bᵀ`.

    `x` integers [...] → [..., size]; `lora_A` [rank, vocabulary], `lora_B` [size, rank]. An output
    head that is tied to the embedding is not changed. There is nothing that dropout could drop.
    """

    kind = "embedding"
    drops = False
    base: nn.Embedding

    @classmethod
    def refusal(cls, base: nn.Module, rank: int, *, whole: bool) -> str | None:
        """An embedding that shortens its vectors as they are read has no fixed weight."""
        if getattr(base, "max_norm", None) is not None:
            return "is an embedding with max_norm, which changes its weight as it is read"
        return None

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> tuple[Shape, Shape]:
        """[rank, vocabulary] and [size, rank]."""
        vocabulary, size = cast(Tensor, base.weight).shape
        return (rank, vocabulary), (size, rank)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Aᵀ[x] Bᵀ, by the factor that some models (Gemma) put on their embeddings."""
        update = linear(nn.functional.embedding(x, A.T, padding_idx=self.base.padding_idx), B)
        factor = getattr(self.base, "embed_scale", None)
        return update if factor is None else update * factor

    def beginning(self, method: bool | str) -> Initialization:
        """Where the base stays as it is, A is the one that is zero."""
        return embedding if method in (True, "gaussian") else super().beginning(method)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """[vocabulary, size] → [size, vocabulary]."""
        return weight.T

    def as_weight(self, matrix: Tensor) -> Tensor:
        """[size, vocabulary] → [vocabulary, size]."""
        return matrix.T
