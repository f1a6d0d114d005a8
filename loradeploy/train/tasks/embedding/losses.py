"""Losses of an embedder's vectors, as sentence-transformers defines them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from loradeploy.train.tasks.embedding.features import POOLING_MASK
from loradeploy.train.tasks.embedding.vectors import Vectors
from loradeploy.train.tasks.losses import BatchLoss, cross_entropy_sum, feeds_of

# The factor of cosines (MultipleNegativesRankingLoss, CoSENTLoss).
_SIMILARITY_SCALE: Final = 20.0
# The margin by which positives should be nearer than negatives, in cosine distance.
_MARGIN: Final = 0.5


def embedding_loss(
    model: nn.Module, inputs: Mapping[str, Tensor], vectors: Vectors, name: str = "ranking"
) -> BatchLoss:
    """The loss `name` of a batch of `RowsCollator`. `vectors`: how vectors are computed."""
    labels = inputs["labels"]
    feeds = {key: value for key, value in feeds_of(inputs).items() if key != POOLING_MASK}
    hidden = model(**feeds).last_hidden_state.float()  # [rows, sequence, hidden]
    found = vectors.of(hidden, inputs.get(POOLING_MASK, inputs["attention_mask"]))
    return LOSSES[name](torch.split(normalize(found, dim=-1), len(labels)), labels)


def _ranking(parts: Sequence[Tensor], labels: Tensor) -> BatchLoss:
    """Cross-entropy of selecting each anchor's own text among all in the batch, by cosine.

    In-batch negatives: Henderson et al., 2017 (arXiv:1705.00652), section 4.4.
    """
    anchors, *texts = parts  # each [batch, size], at length 1
    return cross_entropy_sum(_SIMILARITY_SCALE * anchors @ torch.cat(texts).T, labels)


def _triplet(parts: Sequence[Tensor], labels: Tensor) -> BatchLoss:
    """max(0, d(anchor, positive) - d(anchor, negative) + margin), d being 1 - cosine."""
    anchors, positives, negatives = parts
    nearer = (anchors * positives).sum(-1) - (anchors * negatives).sum(-1)  # [batch]
    return BatchLoss(relu(_MARGIN - nearer).sum(), _count(labels), (nearer.detach() > 0).sum())


def _cosent(parts: Sequence[Tensor], labels: Tensor) -> BatchLoss:
    """log(1 + Σ exp(20 (cosᵢ - cosⱼ))) over all i, j of the batch with a lower score of i."""
    cosines = _SIMILARITY_SCALE * _cosines(parts)
    differences = (cosines[:, None] - cosines[None, :])[labels[:, None] < labels[None, :]]
    loss = torch.cat([cosines.new_zeros(1), differences]).logsumexp(0)
    return _without_accuracy(loss * len(labels), labels)


def _cosine(parts: Sequence[Tensor], labels: Tensor) -> BatchLoss:
    """The squared error of the cosine as a prediction of the score."""
    return _without_accuracy(((_cosines(parts) - labels) ** 2).sum(), labels)


LOSSES: Final[Mapping[str, Callable[[Sequence[Tensor], Tensor], BatchLoss]]] = {
    "ranking": _ranking,
    "triplet": _triplet,
    "cosent": _cosent,
    "cosine": _cosine,
}


def _cosines(parts: Sequence[Tensor]) -> Tensor:
    return (parts[0] * parts[1]).sum(-1)  # [batch]


def _count(labels: Tensor) -> Tensor:
    return torch.tensor(len(labels), device=labels.device)


def _without_accuracy(total: Tensor, labels: Tensor) -> BatchLoss:
    return BatchLoss(total, _count(labels), torch.zeros_like(_count(labels)))
