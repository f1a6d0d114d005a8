"""Examples as token ids, with labels where the loss is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from jinja2 import TemplateError

from loradeploy.errors import DataError
from loradeploy.train.data import Conversation, LabelledText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED: Final = -100  # torch's cross-entropy leaves these out


@dataclass(frozen=True)
class Encoded:
    """Examples as the model reads them; `truncated` of them were longer and lost their end.

    A feature has `input_ids` (a list) and `labels`: a list as long, or a class number.
    """

    features: list[dict[str, Any]]
    truncated: int


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the right: `input_ids` and `attention_mask` [batch, longest], `labels` too,
    or [batch] where they are class numbers; all int64.
    """

    pad_id: int

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(feature["input_ids"]) for feature in features)

        def padded(rows: Sequence[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

        ids = [feature["input_ids"] for feature in features]
        labels = [feature["labels"] for feature in features]
        return {
            "input_ids": padded(ids, self.pad_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded(labels, IGNORED)
            if isinstance(labels[0], list)
            else torch.tensor(labels),
        }


def conversation_features(
    examples: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Token ids of each example, with a label at each token to be learnt.

    Raises:
        DataError: a prompt alone fills `max_length`, so that nothing is left to learn from; chat
            messages that the tokenizer's template is missing for, or refuses.
    """
    features, truncated = [], 0
    for example in examples:
        encode = _chat if example.messages else _parts
        ids, labels = encode(example, tokenizer)
        truncated += len(ids) > max_length
        # The first token is predicted from nothing.
        labels = [IGNORED, *labels[1:max_length]]
        if all(label == IGNORED for label in labels):
            raise DataError(
                f"{example.where}: nothing to learn from within {max_length} tokens:"
                " raise max_length, or shorten the prompt"
            )
        features.append({"input_ids": ids[:max_length], "labels": labels})
    return Encoded(features, truncated)


def text_features(
    examples: Sequence[LabelledText],
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Encoded:
    """Token ids of each text, special tokens included, and the number of its label in `labels`.

    Raises:
        DataError: a text without a single token.
    """
    texts = [example.text for example in examples]
    whole = tokenizer(texts)["input_ids"]
    cut = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    number = {label: index for index, label in enumerate(labels)}
    for example, ids in zip(examples, cut, strict=True):
        if not ids:
            raise DataError(f"{example.where}: the text has no tokens")
    return Encoded(
        features=[
            {"input_ids": list(ids), "labels": number[example.label]}
            for ids, example in zip(cut, examples, strict=True)
        ],
        truncated=sum(len(ids) > max_length for ids in whole),
    )


def _parts(
    example: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Each part tokenised by itself, as a prompt is when it is served."""
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
    """The conversation by the tokenizer's template, labels where the assistant speaks.

    Where a turn begins and ends is told by rendering the conversation up to it.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"{example.where}: messages, but the model's tokenizer has no chat template:"
            " give prompt and completion instead"
        )
    ids = _render(example, tokenizer, len(example.messages))
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        before = _render(example, tokenizer, index, prompt=True)
        after = _render(example, tokenizer, index + 1)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise DataError(
                f"{example.where}: the chat template changes earlier turns, so that the assistant's"
                " cannot be told apart: give prompt and completion instead"
            )
        turn = after[len(before) :]
        if tokenizer.eos_token_id in turn:  # a line break after it is never generated
            turn = turn[: len(turn) - turn[::-1].index(tokenizer.eos_token_id)]
        labels[len(before) : len(before) + len(turn)] = turn
    return ids, labels


def _render(
    example: Conversation, tokenizer: PreTrainedTokenizerBase, count: int, *, prompt: bool = False
) -> list[int]:
    """The first `count` messages as tokens, and the opening of the assistant's turn if `prompt`."""
    try:
        text = tokenizer.apply_chat_template(
            list(example.messages[:count]), tokenize=False, add_generation_prompt=prompt
        )
    except (TemplateError, TypeError, IndexError, KeyError) as problem:
        raise DataError(
            f"{example.where}: the chat template refuses the messages: {problem}"
        ) from None
    return list(tokenizer.encode(text, add_special_tokens=False))
