"""Tokenize the texts of an embedder's examples, and arrange them as rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from loradeploy.errors import DataError
from loradeploy.train.data.features import Encoded, padded_inputs, truncated_ids
from loradeploy.train.tasks.embedding.data import ScoredPair, TextPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loradeploy.train.tasks.embedding.vectors import Vectors

# The texts of an example: the first, the one that it is compared with, and the negative.
_PARTS: Final = ("input_ids", "positive", "negative")
# int64 [rows, longest]: 1 at the tokens that are pooled.
POOLING_MASK: Final = "pooling_mask"


def embedder_features(
    examples: Sequence[TextPair | ScoredPair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    vectors: Vectors,
) -> Encoded:
    """Token ids of each example's texts: `input_ids`, `positive` and optionally `negative`.

    Each text includes its prompt. `unpooled` has the number of the prompt's tokens in each text, if
    they are not pooled. `labels` is the score, or 0.

    Raises:
        DataError: a text without tokens.
    """
    longest = min(max_length, vectors.recipe.max_length or max_length)
    features: list[dict[str, Any]] = [
        {"labels": example.score if isinstance(example, ScoredPair) else 0} for example in examples
    ]
    truncated = 0
    columns = zip(*(example.texts for example in examples), strict=True)
    for number, (name, texts) in enumerate(zip(_PARTS, columns, strict=False)):
        prompt = vectors.prompts[min(number, 1)]
        full = [vectors.text(prompt + text) for text in texts]
        cut, more = truncated_ids(full, tokenizer, longest)
        truncated += more
        unpooled = _unpooled(tokenizer, vectors, prompt, longest)
        for example, feature, ids in zip(examples, features, cut["input_ids"], strict=True):
            if len(ids) <= unpooled:
                raise DataError(f"{example.where}: a text has no tokens")
            feature[name] = list(ids)
            if unpooled:
                feature.setdefault("unpooled", {})[name] = unpooled
    return Encoded(features, truncated)


def _unpooled(
    tokenizer: PreTrainedTokenizerBase, vectors: Vectors, prompt: str, longest: int
) -> int:
    """The number of tokens at a text's beginning that belong to its prompt and are not pooled."""
    if not prompt or vectors.recipe.include_prompt:
        return 0
    ids = tokenizer(vectors.text(prompt), truncation=True, max_length=longest)["input_ids"]
    return len(ids) - bool(ids and ids[-1] in tokenizer.all_special_ids)


@dataclass(frozen=True)
class RowsCollator:
    """One padded batch: the first texts, then those they are compared with, then the negatives.

    `labels`: float [batch], the scores, if examples are `scored`; else int64 [batch], the index of
    the text that belongs to each anchor.
    """

    pad_id: int
    scored: bool = False

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        parts = [part for part in _PARTS if part in features[0]]
        inputs = padded_inputs([f[part] for part in parts for f in features], self.pad_id)
        if "unpooled" in features[0]:
            mask = inputs["attention_mask"].clone()
            skipped = [f["unpooled"].get(part, 0) for part in parts for f in features]
            for row, count in zip(mask, skipped, strict=True):
                row[:count] = 0
            inputs[POOLING_MASK] = mask
        if self.scored:
            labels = torch.tensor([f["labels"] for f in features], dtype=torch.float32)
        else:
            labels = torch.arange(len(features))
        return {**inputs, "labels": labels}
