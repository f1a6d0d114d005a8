"""The losses of the tasks that give no text: sums over a batch, as the causal one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss, normalize

from loradeploy.train.losses import BatchLoss, cross_entropy_sum, feeds_of

# What cosines are multiplied by, as sentence-transformers does (MultipleNegativesRankingLoss).
_SIMILARITY_SCALE: Final = 20.0


def classification_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
    """Cross-entropy of the class of each text (`labels` [batch]) or token ([batch, sequence])."""
    logits = model(**feeds_of(inputs)).logits  # [batch, (sequence,) classes]
    return cross_entropy_sum(logits.flatten(0, -2), inputs["labels"].flatten())


def multi_label_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
    """Binary cross-entropy of each label of each text: `labels` is float [batch, classes]."""
    logits, labels = model(**feeds_of(inputs)).logits.float(), inputs["labels"]
    total = binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    right = ((logits.detach() > 0) == (labels > 0)).sum()
    return BatchLoss(total, torch.tensor(labels.numel(), device=labels.device), right)


def regression_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
    """The squared error of each text's value: `labels` is float [batch]; none counts as right."""
    values, labels = model(**feeds_of(inputs)).logits.float().squeeze(-1), inputs["labels"]
    nothing = torch.tensor(0, device=labels.device)
    return BatchLoss(mse_loss(values, labels, reduction="sum"), nothing + len(labels), nothing)


def embedding_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
    """Cross-entropy of picking, for each anchor, its own text of all in the batch, by cosine.

    In-batch negatives: Henderson et al., 2017 (arXiv:1705.00652), section 4.4. The first rows of
    `inputs`, as many as `labels` [batch] has, are the anchors; the others are what they pick from.
    """
    hidden = model(**feeds_of(inputs)).last_hidden_state.float()  # [rows, sequence, size]
    mask = inputs["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1)  # over the tokens that are no padding
    vectors = normalize(mean, dim=-1)  # [rows, size]
    anchors, texts = vectors[: len(inputs["labels"])], vectors[len(inputs["labels"]) :]
    return cross_entropy_sum(_SIMILARITY_SCALE * anchors @ texts.T, inputs["labels"])
