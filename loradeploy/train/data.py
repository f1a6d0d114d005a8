"""Training data as it lies on disk, read and checked.

For a causal language model JSONL, a line of which is one of

    {"prompt": "…", "completion": "…"}            the loss is on the completion
    {"messages": [{"role": …, "content": …}, …]}  the loss is on what the assistant says
    {"text": "…"}                                 the loss is on all of it

and for a classifier JSONL or CSV with `text` and `label`, or a folder with one folder of .txt files
for each class. Other keys and columns of a line are left alone.
"""

from __future__ import annotations

import csv
import io
import json
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from loradeploy.errors import DataError

# The keys that tell the form of a line: a line has exactly one of them.
_FORMS: Final = ("messages", "completion", "text")
_FIELD_BYTES: Final = 1 << 24

_Example = TypeVar("_Example")


@dataclass(frozen=True)
class Conversation:
    """An example for a causal language model: parts of text, and which the loss is on.

    `messages` is a chat's, where it is one; `parts` are (text, learnt) pairs otherwise.
    `where` is the file and line, for messages to the user.
    """

    where: str
    parts: tuple[tuple[str, bool], ...] = ()
    messages: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class LabelledText:
    """An example for a classifier."""

    where: str
    text: str
    label: str


def read_conversations(path: Path) -> list[Conversation]:
    """The examples in a JSONL file.

    Raises:
        DataError: the file is missing or empty, or a line (named) is none of the three forms.
    """
    if path.is_dir():
        raise DataError(f"{path} is a directory: give a JSONL file")
    return _some([_conversation(where, line) for where, line in _json_lines(path)], path)


def read_labelled_texts(path: Path) -> list[LabelledText]:
    """The examples in a JSONL or CSV file, or in a folder of class folders, in a fixed order.

    Raises:
        DataError: nothing is there, a line (named) has no text or label, or only one class.
    """
    if path.is_dir():
        examples = list(_class_folders(path))
        if not examples:
            raise DataError(f"{path} holds no folder of .txt files: there is one for each class")
    elif path.suffix.lower() == ".csv":
        examples = list(_csv_rows(path))
    else:
        examples = [_labelled(where, line) for where, line in _json_lines(path)]
    _some(examples, path)
    if len({example.label for example in examples}) < 2:
        raise DataError(
            f"{path}: all examples have the label {examples[0].label!r}; two are needed"
        )
    return examples


def label_names(examples: Sequence[LabelledText]) -> tuple[str, ...]:
    """The labels in the order of a classifier's outputs: by number where all are, else by name."""
    names = {example.label for example in examples}
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _some(examples: list[_Example], path: Path) -> list[_Example]:
    if not examples:
        raise DataError(f"{path} holds no examples")
    return examples


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: give the training data") from None
    except UnicodeDecodeError as problem:
        raise DataError(f"{path} is not UTF-8 (byte {problem.start})") from None
    except OSError as problem:
        raise DataError(f"{path} cannot be read: {problem.strerror}") from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines(): a JSON text may hold the Unicode line separators as they are.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise DataError(f"{where}: not JSON ({problem}); each line is an object") from None
        if not isinstance(value, dict):
            raise DataError(f"{where}: a JSON {type(value).__name__}, an object is needed")
        yield where, value


def _conversation(where: str, line: dict[str, Any]) -> Conversation:
    forms = [form for form in _FORMS if form in line]
    if len(forms) > 1:
        raise DataError(f"{where}: has both {' and '.join(forms)}: keep the one to learn from")
    if not forms:
        raise DataError(
            f"{where}: has {', '.join(sorted(line)) or 'no keys'};"
            " it needs prompt and completion, or messages, or text"
        )
    if forms == ["messages"]:
        return Conversation(where, messages=_messages(where, line["messages"]))
    if forms == ["text"]:
        return Conversation(where, ((_text(where, line, "text"), True),))
    prompt = _text(where, line, "prompt", empty=True)
    return Conversation(where, ((prompt, False), (_text(where, line, "completion"), True)))


def _messages(where: str, messages: Any) -> tuple[dict[str, Any], ...]:
    well_formed = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not well_formed:
        raise DataError(f"{where}: messages is no list of objects with role and content")
    for message in messages:
        _text(where, message, "content", empty=message["role"] != "assistant")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message is the assistant's, so there is nothing to learn")
    return tuple(messages)


def _text(where: str, line: dict[str, Any], key: str, *, empty: bool = False) -> str:
    value = line.get(key)
    if not isinstance(value, str) or not (value or empty):
        raise DataError(f"{where}: {key} is {reprlib.repr(value)}, a text is needed")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{where}: {key} holds half a surrogate pair, which is no text")
    return value


def _labelled(where: str, line: dict[str, Any]) -> LabelledText:
    label = line.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise DataError(
            f"{where}: label is {reprlib.repr(label)}, a name or a whole number is needed"
        )
    return LabelledText(where, _text(where, line, "text"), str(label))


def _csv_rows(path: Path) -> Iterator[LabelledText]:
    csv.field_size_limit(_FIELD_BYTES)
    reader = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
    try:
        header = list(reader.fieldnames or ())
        missing = [name for name in ("text", "label") if name not in header]
        if missing and header:
            raise DataError(
                f"{path}: there is no column {' and no column '.join(missing)}:"
                f" the header has {', '.join(header)}"
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(
                    f"{where}: not the {len(header)} fields of the header:"
                    " put texts that hold commas in quotes"
                )
            yield _labelled(where, row)
    except csv.Error as problem:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({problem})") from None


def _class_folders(path: Path) -> Iterator[LabelledText]:
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        for file in sorted(folder.glob("*.txt")):
            try:
                # News archives mix encodings: a stray byte is no reason to refuse a text.
                text = file.read_text(encoding="utf-8", errors="replace").strip()
            except OSError as problem:
                raise DataError(f"{file} cannot be read: {problem.strerror}") from None
            if not text:
                raise DataError(f"{file} is empty")
            yield LabelledText(str(file), text, folder.name)
