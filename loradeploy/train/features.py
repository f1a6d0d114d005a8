"""Examples as token ids, with labels where the loss is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from loradeploy.errors import DataError
from loradeploy.train.data import Conversation, LabelledText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED: Final = -100  # torch's cross-entropy leaves these out


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the right: `input_ids`, `attention_mask`, `labels`, all [batch, longest]."""

    pad_id: int

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(feature["input_ids"]) for feature in features)
        ids = torch.full((len(features), longest), self.pad_id)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORED)
        for row, feature in enumerate(features):
            length = len(feature["input_ids"])
            ids[row, :length] = torch.tensor(feature["input_ids"])
            mask[row, :length] = 1
            if isinstance(feature["labels"], list):
                labels[row, :length] = torch.tensor(feature["labels"])
        if not isinstance(features[0]["labels"], list):
            labels = torch.tensor([feature["labels"] for feature in features])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def conversation_features(
    examples: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, Any]]:
    """`input_ids` and `labels` (lists of one length) of each example.

    Raises:
        DataError: a prompt alone fills `max_length`, so that nothing is left to learn from; chat
            messages for a tokenizer without a template.
    """
    features = []
    for example in examples:
        if example.messages:
            ids, labels = _chat(example, tokenizer)
        else:
            ids, labels = _parts(example, tokenizer)
        ids, labels = ids[:max_length], labels[:max_length]
        # The first token is predicted from nothing: a label there does not count.
        if all(label == IGNORED for label in labels[1:]):
            raise DataError(
                f"{example.where}: nothing to learn from within {max_length} tokens:"
                " raise max_length, or shorten the prompt"
            )
        features.append({"input_ids": ids, "labels": labels})
    return features


def text_features(
    examples: Sequence[LabelledText],
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[dict[str, Any]]:
    """`input_ids` (a list, cut at `max_length`) and `labels` (a class number) of each example."""
    encoded = tokenizer(
        [example.text for example in examples], truncation=True, max_length=max_length
    )
    number = {label: index for index, label in enumerate(labels)}
    return [
        {"input_ids": ids, "labels": number[example.label]}
        for ids, example in zip(encoded["input_ids"], examples, strict=True)
    ]


def _parts(
    example: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for number, (text, learnt) in enumerate(example.parts):
        part = tokenizer.encode(text, add_special_tokens=number == 0)
        ids += part
        labels += part if learnt else [IGNORED] * len(part)
    end = tokenizer.eos_token_id
    if end is not None and (not ids or ids[-1] != end):
        ids.append(end)  # the model must learn to stop
        labels.append(end)
    return ids, labels


def _chat(example: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{example.where}: messages, but the model's tokenizer has no chat template"
        )
    messages = list(example.messages)

    def tokens(count: int, *, prompt: bool) -> list[int]:
        text = tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt
        )
        return list(tokenizer.encode(text, add_special_tokens=False))

    ids = tokens(len(messages), prompt=False)
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = tokens(index, prompt=True), tokens(index + 1, prompt=False)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise DataError(
                f"{example.where}: the chat template changes earlier turns, so that the assistant's"
                " cannot be told apart: give prompt and completion instead"
            )
        labels[len(before) : len(after)] = after[len(before) :]
    return ids, labels
