"""Training data as it lies on disk, read and checked.

For a causal language model JSONL, a line of which is one of

    {"prompt": "…", "completion": "…"}            the loss is on the completion
    {"messages": [{"role": …, "content": …}, …]}  the loss is on what the assistant says
    {"text": "…"}                                 the loss is on all of it

and for a classifier JSONL or CSV with `text` and `label`, or a folder with one folder of .txt files
for each class.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loradeploy.errors import DataError

_FIELD_BYTES: Final = 1 << 24


@dataclass(frozen=True)
class Conversation:
    """An example for a causal language model: parts of text, and which the loss is on.

    `messages` is a chat's, where it is one; `parts` are (text, learnt) pairs otherwise.
    `where` is the file and line, for messages to the user.
    """

    where: str
    parts: tuple[tuple[str, bool], ...] = ()
    messages: tuple[dict[str, str], ...] = ()


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
    examples = [_conversation(where, line) for where, line in _json_lines(path)]
    return _some(examples, path)


def read_labelled_texts(path: Path) -> list[LabelledText]:
    """The examples in a JSONL or CSV file, or in a folder of class folders, in a fixed order.

    Raises:
        DataError: nothing is there, a line (named) has no text or label, or only one class.
    """
    if path.is_dir():
        examples = list(_class_folders(path))
    elif path.suffix == ".csv":
        examples = list(_csv_rows(path))
    else:
        examples = [
            LabelledText(where, _text(where, line, "text"), _label(where, line))
            for where, line in _json_lines(path)
        ]
    _some(examples, path)
    if len({example.label for example in examples}) < 2:
        raise DataError(
            f"{path}: all examples have the label {examples[0].label!r}; two are needed"
        )
    return examples


def _some(examples: list[Any], path: Path) -> list[Any]:
    if not examples:
        raise DataError(f"{path} holds no examples")
    return examples


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as problem:
            raise DataError(f"{where}: not JSON ({problem})") from None
        if not isinstance(value, dict):
            raise DataError(f"{where}: a JSON {type(value).__name__}, an object is needed")
        yield where, value


def _lines(path: Path) -> Sequence[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: give the training data") from None
    except UnicodeDecodeError as problem:
        raise DataError(f"{path} is not UTF-8 (byte {problem.start})") from None
    except OSError as problem:
        raise DataError(f"{path} cannot be read: {problem.strerror}") from None


def _conversation(where: str, line: dict[str, Any]) -> Conversation:
    if "messages" in line:
        return Conversation(where, messages=_messages(where, line["messages"]))
    if "completion" in line:
        prompt = _text(where, line, "prompt", empty=True)
        return Conversation(where, ((prompt, False), (_text(where, line, "completion"), True)))
    if "text" in line:
        return Conversation(where, ((_text(where, line, "text"), True),))
    raise DataError(
        f"{where}: has {', '.join(sorted(line)) or 'no keys'};"
        " it needs prompt and completion, or messages, or text"
    )


def _messages(where: str, messages: Any) -> tuple[dict[str, str], ...]:
    well_formed = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not well_formed:
        raise DataError(f"{where}: messages is no list of objects with role and content")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message is the assistant's, so there is nothing to learn")
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _text(where: str, line: dict[str, Any], key: str, *, empty: bool = False) -> str:
    value = line.get(key)
    if not isinstance(value, str) or not (value or empty):
        raise DataError(f"{where}: {key} is {value!r}, a text is needed")
    return value


def _label(where: str, line: dict[str, Any]) -> str:
    value = line.get("label")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{where}: label is {value!r}, a name or a number is needed")
    return str(value)


def _csv_rows(path: Path) -> Iterator[LabelledText]:
    csv.field_size_limit(_FIELD_BYTES)
    reader = csv.DictReader(_lines(path), strict=True)
    missing = {"text", "label"} - set(reader.fieldnames or ())
    if missing:
        raise DataError(
            f"{path}: the header has no column {' and no column '.join(sorted(missing))}"
        )
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            yield LabelledText(where, _text(where, row, "text"), _label(where, row))
    except csv.Error as problem:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({problem})") from None


def _class_folders(path: Path) -> Iterator[LabelledText]:
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        for file in sorted(folder.glob("*.txt")):
            # News archives mix encodings: a stray byte is no reason to refuse a text.
            text = file.read_text(encoding="utf-8", errors="replace").strip()
            if not text:
                raise DataError(f"{file} is empty")
            yield LabelledText(str(file), text, folder.name)
