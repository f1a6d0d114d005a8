"""The losses: sums over a batch, so that batches of any size add up to one mean."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loradeploy.train.features import IGNORED


@dataclass(frozen=True)
class BatchLoss:
    """`total` (a scalar, with gradient) over `items` labels, of which `right` came out on top."""

    total: Tensor
    items: Tensor
    right: Tensor


LossFunction = Callable[[nn.Module, Mapping[str, Tensor]], BatchLoss]


def causal_lm_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
    """Cross-entropy of the next token, over the labelled tokens of `inputs` [batch, sequence].

    Exactly the model's own loss, but logits are computed only in columns that predict a label,
    where the model lets one say so: over a large vocabulary they cost more than a layer.
    """
    labels = inputs["labels"][:, 1:]  # position t predicts token t + 1
    feeds = {name: value for name, value in inputs.items() if name != "labels"}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        columns = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
        labels = labels[:, columns]
        logits = model(**feeds, logits_to_keep=columns, use_cache=False).logits
    else:
        logits = model(**feeds, use_cache=False).logits[:, :-1]
    return _cross_entropy(logits.flatten(0, 1), labels.flatten())  # [batch · columns, vocabulary]


def classification_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
    """Cross-entropy of the class of each text: `labels` is [batch]."""
    feeds = {name: value for name, value in inputs.items() if name != "labels"}
    return _cross_entropy(model(**feeds).logits, inputs["labels"])  # [batch, classes]


def _cross_entropy(logits: Tensor, labels: Tensor) -> BatchLoss:
    total = cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    counted = labels != IGNORED
    right = (logits.detach().argmax(-1) == labels) & counted
    return BatchLoss(total, counted.sum(), right.sum())
