"""Read and check training examples.

For a causal language model, a row is one of

    {"prompt": "…", "completion": "…"}            the loss is on the completion
    {"messages": [{"role": …, "content": …}, …]}  the loss is on the assistant's messages
    {"text": "…"}                                 the loss is on the whole text

For a classifier, a row has `text` and `label` (a name, several names, or one or more numbers), and
`text_pair` if it classifies pairs of texts. Its data can also be a folder with one folder of .txt
files for each class. For token classification, a row has `tokens` and `tags`, lists of the same
length. For encoder-decoders it has `source` and `target`; for speech, `audio` (the path of a WAV
file, relative to the data's directory), `target`, and optionally `language` and `task`. The rows of
embedders are described in `tasks.embedding.data`. Other columns are ignored. `sources` describes
the file formats.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from loradeploy.adapter.heads import placeholders
from loradeploy.errors import DataError, listed_names
from loradeploy.files import MAX_TEXT_BYTES, read_text
from loradeploy.train.data.sources import Row, Source, is_dataset, rows

# The keys that show the form of a row, which has exactly one of them.
_FORMS: Final = ("messages", "completion", "text")
_LABEL_SEPARATOR: Final = "|"  # of several labels in one field of a CSV file
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class Labeled(Protocol):
    """An example with labels."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of its labels."""


_Example = TypeVar("_Example")
_Labeled = TypeVar("_Labeled", "LabeledText", "MultiLabelText", "MeasuredText")


@dataclass(frozen=True)
class Conversation:
    """An example for a causal language model.

    `messages`: the messages of a chat. `parts`, if it is not a chat: pairs of a text and whether
    the loss includes it. `where`: the file and line, for messages to the user.
    """

    where: str
    parts: tuple[tuple[str, bool], ...] = ()
    messages: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class LabeledText:
    """An example for a classifier of texts or of pairs of texts."""

    where: str
    text: str
    label: str
    pair: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The one label."""
        return (self.label,)


@dataclass(frozen=True)
class MultiLabelText:
    """An example for a classifier in which a text has any number of labels."""

    where: str
    text: str
    labels: tuple[str, ...]
    pair: str | None


@dataclass(frozen=True)
class MeasuredText:
    """An example for a regression of one or more numbers."""

    where: str
    text: str
    values: tuple[float, ...]
    pair: str | None


@dataclass(frozen=True)
class TaggedWords:
    """An example for token classification: a tag for each word."""

    where: str
    words: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The tags."""
        return self.tags


@dataclass(frozen=True)
class Translation:
    """An example for an encoder-decoder of texts."""

    where: str
    source: str
    target: str


@dataclass(frozen=True)
class SpokenText:
    """An example for speech: a WAV file and its text, in a language, transcribed or translated."""

    where: str
    audio: Path
    target: str
    language: str | None = None
    task: str | None = None


def read_conversations(source: Source) -> list[Conversation]:
    """The examples for a causal language model.

    Raises:
        DataError: there are no examples, or a row (named) has none of the three forms.
    """
    return non_empty([_conversation(where, row) for where, row in rows(source)], source)


def read_labeled_texts(source: Source) -> list[LabeledText]:
    """The examples for a classifier, in a fixed order.

    Raises:
        DataError: there are no examples, a row (named) has no text or label, or only some rows have
            a text_pair.
    """
    return _all_pairs_or_none(
        non_empty([_labeled(where, row) for where, row in _texts(source)], source)
    )


def read_multi_label_texts(source: Source) -> list[MultiLabelText]:
    """The examples for a multi-label classifier. In CSV, | separates labels in one field.

    Raises:
        DataError: there are no examples, or a row (named) has no text or no list of labels.
    """
    examples = []
    for where, row in _texts(source):
        labels = row.get("label")
        if isinstance(labels, str):
            labels = [name.strip() for name in labels.split(_LABEL_SEPARATOR) if name.strip()]
        if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
            raise _contradicts(where, labels, "multi-label", "a list of names")
        text, pair = text_of(where, row, "text"), _pair(where, row)
        examples.append(MultiLabelText(where, text, tuple(labels), pair))
    return _all_pairs_or_none(non_empty(examples, source))


def read_measured_texts(source: Source) -> list[MeasuredText]:
    """The examples for a regression.

    Raises:
        DataError: there are no examples, or a row (named) has no text, no finite numbers as its
            label, or not as many as the first row.
    """
    examples: list[MeasuredText] = []
    for where, row in _texts(source):
        label = row.get("label")
        values = tuple(map(number_in, label if isinstance(label, list) else [label]))
        if not values or not all(map(math.isfinite, values)):
            raise _contradicts(where, label, "regression", "a number, or a list of numbers,")
        if examples and len(values) != len(examples[0].values):
            raise DataError(
                f"{where}: label has {len(values)} numbers, those before it have"
                f" {len(examples[0].values)}: expected one for each output"
            )
        examples.append(MeasuredText(where, text_of(where, row, "text"), values, _pair(where, row)))
    return _all_pairs_or_none(non_empty(examples, source))


def number_in(value: Any) -> float:
    """`value` as a number; NaN if it is not one."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _contradicts(where: str, label: Any, problem_type: str, needed: str) -> DataError:
    return DataError(
        f"{where}: label is {reprlib.repr(label)}, expected {needed} for `problem_type="
        f'"{problem_type}"`'
    )


def read_tagged_words(source: Source) -> list[TaggedWords]:
    """The examples for token classification.

    Raises:
        DataError: there are no examples, or a row (named) lacks lists of words and of as many tags.
    """
    examples = []
    for where, row in rows(source, ("tokens", "tags")):
        words, tags = (_name_list(where, row, name) for name in ("tokens", "tags"))
        if len(words) != len(tags):
            raise DataError(
                f"{where}: {len(words)} tokens and {len(tags)} tags: expected one tag for each"
            )
        examples.append(TaggedWords(where, words, tags))
    return non_empty(examples, source)


def read_translations(source: Source) -> list[Translation]:
    """The examples for an encoder-decoder of texts.

    Raises:
        DataError: there are no examples, or a row (named) lacks a text.
    """
    examples = [
        Translation(where, text_of(where, row, "source"), text_of(where, row, "target"))
        for where, row in rows(source, ("source", "target"))
    ]
    return non_empty(examples, source)


def read_spoken_texts(source: Source) -> list[SpokenText]:
    """The examples for speech. Paths are relative to the directory of the data.

    Raises:
        DataError: there are no examples, or a row (named) lacks a path or a text.
    """
    beside = source.path if source.path.is_dir() else source.path.parent
    examples = []
    for where, row in rows(source, ("audio", "target")):
        given = {
            name: text_of(where, row, name)
            for name in ("language", "task")
            if row.get(name) is not None
        }
        audio = beside / text_of(where, row, "audio")
        examples.append(SpokenText(where, audio, text_of(where, row, "target"), **given))
    return non_empty(examples, source)


def label_names(
    examples: Sequence[Labeled],
) -> tuple[str, ...]:
    """The labels in the order of a classifier's outputs: as numbers if all are, else by name."""
    names = {name for example in examples for name in example.labels}
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def value_names(examples: Sequence[MeasuredText]) -> tuple[str, ...]:
    """Placeholder names for the numbers of a regression; empty if there is only one."""
    count = len(examples[0].values)
    return placeholders(count) if count > 1 else ()


def non_empty(examples: list[_Example], source: Source) -> list[_Example]:
    """Return `examples`; raises DataError if there are none."""
    if not examples:
        raise DataError(f"{source} has no examples")
    return examples


def _name_list(where: str, row: dict[str, Any], key: str) -> tuple[str, ...]:
    values = row.get(key)
    if not isinstance(values, list) or not values or not all(map(_is_name, values)):
        raise DataError(f"{where}: {key} is {reprlib.repr(values)}, expected a list of texts")
    return tuple(map(str, values))


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""


def _texts(source: Source) -> Iterator[Row]:
    """Rows with a text and a label, from any format or from a folder of class folders."""
    if source.path.is_dir() and not is_dataset(source):
        found = list(_class_folders(source.path))
        if not found:
            raise DataError(f"{source} has no folder of .txt files: expected one for each class")
        return iter(found)
    return rows(source, ("text", "label"))


def _conversation(where: str, line: dict[str, Any]) -> Conversation:
    forms = [form for form in _FORMS if form in line]
    if len(forms) > 1:
        raise DataError(f"{where}: has both {' and '.join(forms)}: keep the one to learn from")
    if not forms:
        raise DataError(
            f"{where}: has {listed_names(sorted(line), none='no keys')};"
            " it needs prompt and completion, or messages, or text"
        )
    if forms == ["messages"]:
        return Conversation(where, messages=_messages(where, line["messages"]))
    if forms == ["text"]:
        return Conversation(where, ((text_of(where, line, "text"), True),))
    prompt = text_of(where, line, "prompt", empty=True)
    return Conversation(where, ((prompt, False), (text_of(where, line, "completion"), True)))


def _messages(where: str, messages: Any) -> tuple[dict[str, Any], ...]:
    well_formed = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not well_formed:
        raise DataError(f"{where}: messages is not a list of objects with role and content")
    for message in messages:
        text_of(where, message, "content", empty=message["role"] != "assistant")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message is the assistant's, so there is nothing to learn")
    return tuple(messages)


def text_of(where: str, line: dict[str, Any], key: str, *, empty: bool = False) -> str:
    """The text at `key` of a row; DataError if it is not a text, or empty without `empty`."""
    value = line.get(key)
    if not isinstance(value, str) or not (value or empty):
        raise DataError(f"{where}: {key} is {reprlib.repr(value)}, expected a text")
    if _SURROGATE.search(value):
        raise DataError(f"{where}: {key} contains an unpaired surrogate")
    return value


def _labeled(where: str, line: dict[str, Any]) -> LabeledText:
    label = label_of(where, line)
    return LabeledText(where, text_of(where, line, "text"), label, _pair(where, line))


def label_of(where: str, line: dict[str, Any]) -> str:
    """The one label of a row; DataError if it has none, or several."""
    label = line.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise _contradicts(where, label, "single-label", "a name or a whole number")
    return str(label)


def _pair(where: str, line: dict[str, Any]) -> str | None:
    """The second text of a pair; None if a row has one text."""
    return None if line.get("text_pair") is None else text_of(where, line, "text_pair")


def _all_pairs_or_none(examples: list[_Labeled]) -> list[_Labeled]:
    for example in examples:
        if (example.pair is None) != (examples[0].pair is None):
            raise DataError(f"{example.where}: some rows have a text_pair and others have none")
    return examples


def _class_folders(path: Path) -> Iterator[Row]:
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        for file in sorted(folder.glob("*.txt")):
            # News archives mix encodings: texts with invalid bytes are not refused.
            text = read_text(file, error=DataError, limit=MAX_TEXT_BYTES, errors="replace").strip()
            if not text:
                raise DataError(f"{file} is empty")
            yield str(file), {"text": text, "label": folder.name}
