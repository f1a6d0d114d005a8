"""Packed sequences: the examples of a batch are concatenated into one row, without padding.

Positions restart with each example, and tokens attend only to their own example: attention runs
example by example, which is exact and costs less than a mask over the row. Whether a model supports
this is measured, not derived from its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, pairwise
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from loradeploy.lora.quiet import quiet

PACKED: Final = "loradeploy_packed"
# The name that transformers passes on to attention functions (FlashAttentionKwargs).
STARTS: Final = "cu_seq_lens_q"
# The name of the argument `queries` of `packed_attention`.
QUERIES: Final = "queries"
_PROBED_LENGTHS: Final = (5, 9, 2)
# The sliding window in the trial, which is shorter than an example.
_PROBED_WINDOW: Final = 4
# Relative to the largest logit. Packed and single examples differ only by the order of summation.
_SAME: Final = {torch.float32: 1e-4}
_SAME_HALF: Final = 3e-2


class PackingCollator:
    """The examples of a batch in one row: `input_ids`, `position_ids` and `labels` [1, tokens].

    `cu_seq_lens_q` int32 [examples + 1] are the positions where each begins, and where the last one
    ends.
    """

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [feature["input_ids"] for feature in features]
        lengths = [len(row) for row in rows]
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return {
            "input_ids": torch.tensor([token for row in rows for token in row])[None],
            "position_ids": torch.tensor([i for length in lengths for i in range(length)])[None],
            "labels": torch.tensor([label for f in features for label in f["labels"]])[None],
            STARTS: starts,
        }


def enable_packing(model: PreTrainedModel) -> bool:
    """Set the attention of `model` to that of packed sequences, if the model supports it.

    Returns whether it does. It does not if packed examples give other logits than single ones: for
    recurrent and state-space models, position biases, chunked attention, and models that do not
    pass the lengths or a sliding window on. Call it before `fuse`, which keeps the window.
    """
    before = model.config._attn_implementation
    if before == PACKED:
        return True
    AttentionInterface.register(PACKED, packed_attention)
    with quiet(), suppress(Exception):  # any exception means that the model does not support it
        if before == "sdpa" and _chunk(model) is None:
            examples = trial_examples(model)
            with _narrow_windows(model), evaluating(model):
                expected = separate_logits(model, examples)
                model.set_attn_implementation(PACKED)
                found = packed_logits(model, examples)
            if same_logits(model, found, expected):
                return True
    model.set_attn_implementation(before)
    return False


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    queries: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention within each example of a packed row, for transformers' AttentionInterface.

    `query` [1, heads, tokens, size], `key` and `value` [1, key-value heads, tokens, size] →
    [1, tokens, heads, size]. With `queries`, the ascending positions of some tokens, `query` and
    the result have only these tokens.
    """
    if cu_seq_lens_q is None:
        raise ValueError(f"{type(module).__name__} does not pass the positions of the examples on")
    lengths = cu_seq_lens_q.diff().tolist()
    counts = lengths  # of the queries of each example
    places: Sequence[Tensor | None] = [None] * len(lengths)
    if queries is not None:
        places = some = _places(cu_seq_lens_q, queries)
        counts = [len(at) for at in some]
    # One split and one concatenation: gradients of slices would each have the size of the row. The
    # tokens are split in the layout of the projections, in which gradients are joined without
    # strides.
    parts = zip(
        torch.split(query.transpose(1, 2), counts, dim=1),
        *(torch.split(t.transpose(1, 2), lengths, dim=1) for t in (key, value)),
        places,
        strict=True,
    )
    attended = []
    for *tensors, at in parts:
        q, k, v = (part.transpose(1, 2) for part in tensors)
        if q.shape[2]:
            mask = _mask(k, sliding_window, at)
            attended.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(attended, dim=1), None


def _places(starts: Tensor, queries: Tensor) -> list[Tensor]:
    """The positions of the queries of each example, counted from its begin."""
    return [
        queries[(queries >= begin) & (queries < end)] - begin
        for begin, end in pairwise(starts.tolist())
    ]


def _mask(key: Tensor, window: int | None, queries: Tensor | None) -> Tensor | None:
    """The mask [1, 1, queries, tokens] of a sliding window, or of some queries; None if causal."""
    length = key.shape[2]
    if queries is None and (window is None or length <= window):
        return None
    positions = torch.arange(length, device=key.device)
    distance = (positions if queries is None else queries)[:, None] - positions[None, :]
    return ((distance >= 0) & (distance < (window or length)))[None, None]


def _chunk(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "attention_chunk_size", None)


@contextmanager
def _narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Inside the context, sliding windows are shorter than the longest example of the trial.

    transformers reads them from the config for masks, and from modules for attention functions.
    """
    owners: dict[int, Any] = {
        id(owner): owner
        for module in model.modules()
        for owner in (module, getattr(module, "config", None))
        if isinstance(getattr(owner, "sliding_window", None), int)
    }
    windows = [(owner, owner.sliding_window) for owner in owners.values()]
    excess = max(0, min((window for _, window in windows), default=0) - _PROBED_WINDOW)
    try:
        for owner, window in windows:
            owner.sliding_window = window - excess
        yield
    finally:
        for owner, window in windows:
            owner.sliding_window = window


def trial_examples(model: PreTrainedModel) -> list[list[int]]:
    """Random examples of different lengths."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    return [
        torch.randint(vocabulary, (length,), generator=generator).tolist()
        for length in _PROBED_LENGTHS
    ]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside the context, `model` is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def separate_logits(model: PreTrainedModel, examples: Sequence[list[int]]) -> Tensor:
    """The logits [1, tokens, vocabulary] of `examples`, each computed alone, float32."""
    rows = [torch.tensor([row], device=model.device) for row in examples]
    return torch.cat([_logits(model, input_ids=row) for row in rows], dim=1)


def same_logits(model: PreTrainedModel, logits: Tensor, expected: Tensor) -> bool:
    """Whether two logits of `model` differ only by the order of sums."""
    limit = _SAME.get(model.dtype, _SAME_HALF) * float(expected.abs().max())
    return torch.allclose(logits, expected, rtol=0, atol=limit)


def packed_logits(model: PreTrainedModel, examples: Sequence[list[int]]) -> Tensor:
    """The logits [1, tokens, vocabulary] of a batch of `examples`, float32."""
    batch = PackingCollator()([{"input_ids": row, "labels": row} for row in examples])
    del batch["labels"]
    return _logits(model, **{name: value.to(model.device) for name, value in batch.items()})


@torch.no_grad()
def _logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float()
