"""The losses of all tasks, as sums over a batch, so that batches can be averaged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast
from weakref import WeakSet

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    linear,
    mse_loss,
)

from loradeploy.bundle.names import INPUT_FEATURES
from loradeploy.train.data.features import IGNORED
from loradeploy.train.fusion.last_layer import output_at

# Number of logits in a chunk: 64 MiB of float32.
_CHUNK: Final = 1 << 24
# Models that change the logits after the output head: soft-capping, scaling.
_SHAPED: Final[WeakSet[nn.Module]] = WeakSet()


@dataclass(frozen=True)
class BatchLoss:
    """`total` (a scalar, with gradient) over `items` labels, of which `right` were predicted."""

    total: Tensor
    items: Tensor
    right: Tensor


LossFunction = Callable[[nn.Module, Mapping[str, Tensor]], BatchLoss]


def causal_lm_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
    """Cross-entropy of the next token, over the labeled tokens of `inputs` [batch, sequence].

    Equals the model's loss, but logits are computed only for labeled tokens, and in chunks: with a
    large vocabulary they can take more time than layers, and more memory than the rest. Of packed
    batches, the last layer is computed only for labeled tokens if `shorten` prepared it.
    """
    labels = inputs["labels"].roll(-1, dims=1)  # position t predicts token t + 1
    labels[:, -1] = IGNORED
    feeds = feeds_of(inputs)
    head = _frozen_head(model)
    if head is not None and model not in _SHAPED:
        positions = (labels[0] != IGNORED).nonzero().squeeze(1)
        shortened = output_at(extract_model_from_parallel(model), positions)
        with _loss_in(head, labels) as found, shortened:
            logits = model(**feeds, use_cache=False).logits
        # An operation in place returns this tensor, too, but with another version.
        if found and logits is found[0].logits and not logits._version:
            return found[0].loss
        _SHAPED.add(model)
    return _loss_of_logits(model, feeds, labels)


def feeds_of(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the model in a batch: all but the labels."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> BatchLoss:
    """Cross-entropy of `logits` [items, classes] at the `labels` [items] that are not IGNORED."""
    total = cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    counted = labels != IGNORED
    right = (logits.detach().argmax(-1) == labels) & counted
    return BatchLoss(total, counted.sum(), right.sum())


def _loss_of_logits(model: nn.Module, feeds: Mapping[str, Tensor], labels: Tensor) -> BatchLoss:
    """The loss from the model's logits, only for columns with labels if the model supports it."""
    unwrapped = extract_model_from_parallel(model)
    if "logits_to_keep" in inspect.signature(unwrapped.forward).parameters:
        columns = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
        labels = labels[:, columns]
        logits = model(**feeds, logits_to_keep=columns, use_cache=False).logits
    else:
        logits = model(**feeds, use_cache=False).logits
    return cross_entropy_sum(logits.flatten(0, 1), labels.flatten())


@dataclass(frozen=True, eq=False)
class _InHead:
    """A loss that was computed in the output head, and what the head returned instead of logits."""

    loss: BatchLoss
    logits: Tensor


def _frozen_head(model: nn.Module) -> nn.Linear | None:
    """The output head, if it is a standard, frozen and unsharded linear layer; else None."""
    unwrapped: Any = extract_model_from_parallel(model)
    head = getattr(unwrapped, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return None
    return None if any(p.requires_grad for p in head.parameters()) else head


@contextmanager
def _loss_in(head: nn.Linear, labels: Tensor) -> Iterator[list[_InHead]]:
    """Inside the context, `head` computes the loss at `labels` instead of logits.

    The model gets an empty tensor for logits. If it returns this same tensor, it does not change
    its logits after the head. For inputs of other rows, such as flattened ones, it gets logits.
    """
    found: list[_InHead] = []
    own = head.forward

    def forward(input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        counted = labels != IGNORED
        # A shortened last layer returns only these rows.
        rows = input[counted] if input.shape[:-1] == labels.shape else input.flatten(0, -2)
        if len(rows) != counted.sum():
            return own(input)
        total, right = _HeadLoss.apply(rows, head.weight, head.bias, labels[counted])  # type: ignore[no-untyped-call]
        empty = torch.empty((*input.shape[:-1], 0), device=input.device)
        found.append(_InHead(BatchLoss(total, counted.sum(), right), empty))
        return empty

    head.forward = forward  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del head.forward


class _HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of `hidden Wᵀ + b` at `labels`, and the number of correct predictions.

    The head is frozen, so the backward pass needs only the gradient of `hidden`, which is computed
    while the logits of a chunk exist.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, W: Tensor, b: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        total = torch.zeros((), device=hidden.device)
        right = torch.zeros((), dtype=torch.int64, device=hidden.device)
        size = max(1, _CHUNK // W.shape[0])
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            logits = linear(hidden[rows], W, b).float()  # [chunk, vocabulary]
            at = labels[rows, None]
            right += (logits.argmax(-1, keepdim=True) == at).sum()
            normalizer = logits.logsumexp(-1, keepdim=True)
            total += (normalizer - logits.gather(-1, at)).sum()
            if gradient is not None:  # of the logits: softmax less one at the label
                slope = logits.sub_(normalizer).exp_()
                slope.scatter_add_(-1, at, torch.full_like(at, -1, dtype=slope.dtype))
                gradient[rows] = slope.to(W.dtype) @ W
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return cast(Tensor, gradient) * gradients[0].to(gradient.dtype), None, None, None


def seq2seq_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
    """Cross-entropy of the tokens of each target (`labels` [batch, target]).

    The model computes the decoder's inputs from the labels.
    """
    labels, feeds = inputs["labels"], feeds_of(inputs)
    if (audio := feeds.get(INPUT_FEATURES)) is not None:  # converted to the dtype of the base
        feeds[INPUT_FEATURES] = audio.to(cast(Any, extract_model_from_parallel(model)).dtype)
    logits = model(**feeds, labels=labels, use_cache=False).logits
    return cross_entropy_sum(logits.flatten(0, 1), labels.flatten())


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
    """The squared error of each number: `labels` is float [batch, numbers]. No accuracy."""
    values, labels = model(**feeds_of(inputs)).logits.float(), inputs["labels"]
    nothing = torch.tensor(0, device=labels.device)
    total = mse_loss(values, labels.view_as(values), reduction="sum")
    return BatchLoss(total, nothing + labels.numel(), nothing)
