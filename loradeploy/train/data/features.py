"""Tokenize examples, with labels for the tokens of the loss."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import torch
from jinja2 import TemplateError

from loradeploy.bundle.names import TOKEN_TYPE_IDS
from loradeploy.bundle.text.chat import ChatTemplate
from loradeploy.errors import BundleError, DataError, UsageError, listed_names, shown
from loradeploy.train.data.examples import (
    Conversation,
    LabeledText,
    MeasuredText,
    MultiLabelText,
    TaggedWords,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS_ASSISTANT: Final = re.compile(r"{%-?\s*generation\b")

IGNORED: Final = -100  # ignored by torch's cross-entropy


@dataclass(frozen=True)
class Encoded:
    """Tokenized examples, of which `truncated` were longer than the limit.

    A feature has `input_ids`, a list, and `labels`: a list of the same length, or another form that
    the task's collator describes.
    """

    features: list[dict[str, Any]]
    truncated: int


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the right: int64 `input_ids` and `attention_mask` [batch, longest].

    `token_type_ids`, int64 [batch, longest], if the examples have them.
    `labels`: [batch, longest] if an example has a list of class numbers; [batch] if it has one
    number; [batch, classes] if it has a list of floats.
    """

    pad_id: int

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = [feature["labels"] for feature in features]
        by_token = isinstance(labels[0], list) and not isinstance(labels[0][0], float)
        inputs = padded_inputs([feature["input_ids"] for feature in features], self.pad_id)
        longest = inputs["input_ids"].shape[1]
        if TOKEN_TYPE_IDS in features[0]:
            types = [feature[TOKEN_TYPE_IDS] for feature in features]
            inputs[TOKEN_TYPE_IDS] = torch.tensor(padded(types, 0, longest))
        return {
            **inputs,
            "labels": torch.tensor(padded(labels, IGNORED, longest) if by_token else labels),
        }


def padded_inputs(rows: Sequence[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """int64 `input_ids` and `attention_mask` [rows, longest]."""
    longest = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor(padded(rows, pad_id, longest)),
        "attention_mask": torch.tensor(padded([[1] * len(row) for row in rows], 0, longest)),
    }


def padded(rows: Sequence[list[int]], filler: int, longest: int) -> list[list[int]]:
    """`rows`, each padded at its end with `filler` to the length `longest`."""
    return [row + [filler] * (longest - len(row)) for row in rows]


def conversation_features(
    examples: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Token ids of each example, with labels at the tokens of the loss.

    Raises:
        DataError: a prompt fills `max_length`, so that no tokens of the loss are left; or the
            tokenizer has no chat template for messages, or the template refuses them.
    """
    features, truncated = [], 0
    for example in examples:
        encode = _chat if example.messages else _parts
        ids, labels = encode(example, tokenizer)
        truncated += len(ids) > max_length
        # The first token cannot be predicted from other tokens.
        labels = [IGNORED, *labels[1:max_length]]
        if all(label == IGNORED for label in labels):
            raise DataError(
                f"{example.where}: no tokens of the loss within {max_length} tokens:"
                " raise `max_length`, or shorten the prompt"
            )
        features.append({"input_ids": ids[:max_length], "labels": labels})
    return Encoded(features, truncated)


def text_features(
    examples: Sequence[LabeledText | MultiLabelText | MeasuredText],
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Encoded:
    """Token ids of each text or pair, special tokens included, and its labels.

    Pairs also have `token_type_ids` if the tokenizer returns them. If a pair is longer than
    `max_length`, the longer text is cut first.

    The feature `labels` is the index of the label in the argument `labels`; or a list with 1.0 for
    each of its labels and 0.0 for the others; or the numbers of a regression.

    Raises:
        DataError: a text without tokens, or a label that is not one of `labels`.
    """
    texts = [example.text for example in examples]
    pairs = [example.pair for example in examples if example.pair is not None]
    cut, truncated = truncated_ids(texts, tokenizer, max_length, pairs)
    features: list[dict[str, Any]] = []
    for example, ids in zip(examples, cut["input_ids"], strict=True):
        if not ids:
            raise DataError(f"{example.where}: the text has no tokens")
        features.append({"input_ids": list(ids), "labels": _target(example, labels)})
    if pairs and TOKEN_TYPE_IDS in cut:
        for feature, types in zip(features, cut[TOKEN_TYPE_IDS], strict=True):
            feature[TOKEN_TYPE_IDS] = list(types)
    return Encoded(features, truncated)


def word_features(
    examples: Sequence[TaggedWords],
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Encoded:
    """Token ids of each example's words, with the tag's index at the first token of each word.

    The words are tokenized as one text with spaces between them, as at run time: separate words
    give other tokens if tokens can begin with a space.

    Raises:
        DataError: an unknown tag, no tagged word within `max_length`, or a tokenizer that does not
            specify the positions of its tokens.
    """
    if not tokenizer.is_fast:
        raise DataError("the model's tokenizer does not specify which token is of which word")
    features, truncated = [], 0
    for example in examples:
        numbers = [label_number(example.where, tag, labels) for tag in example.tags]
        encoded = tokenizer(" ".join(example.words), return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        truncated += len(ids) > max_length
        ends = list(accumulate(len(word) + 1 for word in example.words))  # after the spaces
        marks, last = [], -1
        for start, end in spans[:max_length]:
            word = bisect_right(ends, end - 1)  # the word with the token's last letter
            begins = end > start and word > last
            marks.append(numbers[word] if begins else IGNORED)
            last = max(last, word) if begins else last
        if all(mark == IGNORED for mark in marks):
            raise DataError(f"{example.where}: no tagged word within {max_length} tokens")
        features.append({"input_ids": list(ids[:max_length]), "labels": marks})
    return Encoded(features, truncated)


def truncated_ids(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    pairs: Sequence[str] = (),
) -> tuple[Mapping[str, list[list[int]]], int]:
    """The tokenizer's lists for each text or pair, cut to `max_length`; how many were longer.

    `pairs`: the second texts of all pairs, or none.
    """
    if tokenizer.is_fast and not pairs:
        return _cut_in_one_pass(texts, tokenizer, max_length)
    given = (list(texts), list(pairs)) if pairs else (list(texts),)
    full = tokenizer(*given)["input_ids"]
    cut = tokenizer(*given, truncation="longest_first", max_length=max_length)
    return cut, sum(len(ids) > max_length for ids in full)


def _cut_in_one_pass(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Mapping[str, list[list[int]]], int]:
    """Like `truncated_ids`; the tokenizer returns the rest of a longer text as further lists."""
    found = tokenizer(
        list(texts), truncation=True, max_length=max_length, return_overflowing_tokens=True
    )
    parts = Counter(found["overflow_to_sample_mapping"])  # in the order of the texts
    firsts = accumulate([0, *(parts[text] for text in range(len(texts) - 1))])
    ids = found["input_ids"]
    return {"input_ids": [ids[first] for first in firsts]}, sum(n > 1 for n in parts.values())


def _target(
    example: LabeledText | MultiLabelText | MeasuredText, labels: Sequence[str]
) -> int | list[float]:
    if isinstance(example, MeasuredText):
        if len(example.values) != max(1, len(labels)):
            raise DataError(
                f"{example.where}: label has {len(example.values)} numbers, the examples trained on"
                f" have {max(1, len(labels))}"
            )
        return list(example.values)
    if isinstance(example, LabeledText):
        return label_number(example.where, example.label, labels)
    present = {label_number(example.where, name, labels) for name in example.labels}
    return [float(number in present) for number in range(len(labels))]


def label_number(where: str, label: str, labels: Sequence[str]) -> int:
    """The index of `label` in `labels`, those trained on; DataError if it is not one of them."""
    if label not in labels:
        raise DataError(
            f"{where}: the label {shown(label)} is not one of those trained on:"
            f" {listed_names(labels)}"
        )
    return labels.index(label)


def _parts(
    example: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokenize each part separately, as a prompt is tokenized at run time."""
    ids: list[int] = []
    labels: list[int] = []
    for number, (text, learned) in enumerate(example.parts):
        part = tokenizer.encode(text, add_special_tokens=number == 0)
        ids += part
        labels += part if learned else [IGNORED] * len(part)
    end = tokenizer.eos_token_id
    if end is not None and (not ids or ids[-1] != end):
        ids.append(end)  # the model must learn to stop
        labels.append(end)
    return ids, labels


def _chat(example: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokenize the conversation by the chat template, with labels on assistant turns.

    A template may mark assistant turns ({% generation %}). Otherwise their positions are found by
    rendering the conversation up to each turn.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"{example.where}: messages, but the model's tokenizer has no chat template:"
            " give prompt and completion instead"
        )
    _check_template(example, tokenizer)
    if _MARKS_ASSISTANT.search(str(tokenizer.chat_template)):
        return _marked_chat(example, tokenizer)
    ids = _render(example, tokenizer, len(example.messages))
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        before = _render(example, tokenizer, index, prompt=True)
        after = _render(example, tokenizer, index + 1)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise DataError(
                f"{example.where}: the chat template changes earlier turns, so that assistant turns"
                " cannot be located: give prompt and completion instead"
            )
        turn = after[len(before) :]
        if tokenizer.eos_token_id in turn:  # a line break after it is never generated
            turn = turn[: len(turn) - turn[::-1].index(tokenizer.eos_token_id)]
        labels[len(before) : len(before) + len(turn)] = turn
    return ids, labels


def _check_template(example: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    """Render the conversation with limits; transformers has none, and may not terminate."""
    try:
        source = str(tokenizer.get_chat_template())
    except ValueError:  # several templates without a default: transformers will raise an error
        return
    names = tuple((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    try:
        _template(source, names).render(example.messages, add_generation_prompt=False)
    except (UsageError, BundleError) as problem:
        raise DataError(f"{example.where}: {problem}") from None


@lru_cache(maxsize=4)
def _template(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    template = ChatTemplate(source, dict(special_tokens))
    template.check_constants()  # transformers evaluates them when it compiles
    return template


def _marked_chat(
    example: Conversation, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    try:
        encoded = tokenizer.apply_chat_template(
            list(example.messages), return_dict=True, return_assistant_tokens_mask=True
        )
    except (TemplateError, TypeError, IndexError, KeyError) as problem:
        raise _refused(example, problem) from None
    ids = list(encoded["input_ids"])
    marks = encoded["assistant_masks"]
    return ids, [i if mark else IGNORED for i, mark in zip(ids, marks, strict=True)]


def _refused(example: Conversation, problem: Exception) -> DataError:
    return DataError(f"{example.where}: the chat template refuses the messages: {problem}")


def _render(
    example: Conversation, tokenizer: PreTrainedTokenizerBase, count: int, *, prompt: bool = False
) -> list[int]:
    """The first `count` messages as tokens, and the opening of the assistant's turn if `prompt`."""
    try:
        text = tokenizer.apply_chat_template(
            list(example.messages[:count]), tokenize=False, add_generation_prompt=prompt
        )
    except (TemplateError, TypeError, IndexError, KeyError) as problem:
        raise _refused(example, problem) from None
    return list(tokenizer.encode(text, add_special_tokens=False))
