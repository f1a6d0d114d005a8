"""Read prompts from files: one per line, or JSONL whose objects may choose an adapter each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.errors import DataError, shown
from loradeploy.files import (
    MAX_TEXT_BYTES,
    UNREAD_FILES,
    is_json_lines,
    json_line,
    numbered_lines,
    read_text,
)
from loradeploy.runtime.decoding.choosing.options import GenerationOptions

if TYPE_CHECKING:
    from loradeploy.runtime.adapters.resident import AdapterSpec

# The prompt is the first of these fields that an object has.
_FIELDS: Final = ("prompt", "messages", "text")
# Files whose lines are not prompts; those of training data among them.
_TABLES: Final = UNREAD_FILES | {".csv", ".parquet"}
# Fields by which other programs choose an adapter: adapters, adapter_name, lora, lora_request.
_CHOICE: Final = re.compile(r"adapter|(?:^|_)lora", re.IGNORECASE)
# Fields that datasets for vision-language models use for images and videos.
_IMAGES: Final = ("image", "images", "image_url", "pixel_values", "video", "videos")
# Generation settings that an object may have; a function cannot be written in JSON.
_SETTINGS: Final = (
    *(option.name for option in fields(GenerationOptions) if option.name != "allowed_tokens"),
    "seed",
)
# How similar a name must be to that of a setting, of how many letters; of shorter ones, other words
# are as similar (speed and seed). And other programs' names of settings.
_ALIKE: Final = 0.85
_LONG: Final = 6
_SYNONYMS: Final = dict.fromkeys(
    ("max_tokens", "max_completion_tokens", "max_length", "max_gen_len", "num_predict"),
    "max_new_tokens",
)


@dataclass(frozen=True)
class InputPrompt:
    """A prompt and its adapter: a name, a path, a mapping of names to weights, or None: the base.

    `prompt`: a text, a pair of texts, or a conversation as a list of messages. `settings`: this
    prompt's own generation settings, by the names in `GenerationOptions`, and `seed`.
    `audio`: the path of an audio file, which a speech recognizer takes instead of a prompt.
    `images`: the object's fields with images or videos, by their names. `where`: the file and line
    that the prompt was read from, for messages.
    """

    prompt: str | tuple[str, str] | list[Any]
    adapter: AdapterSpec | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    audio: str | None = None
    images: Mapping[str, Any] = field(default_factory=dict)
    where: str | None = None


def read_requests(
    file: str | os.PathLike[str], adapter: AdapterSpec | None = None
) -> list[InputPrompt]:
    """Read the prompts in a file, which is plain text or JSONL; see `parse_requests`.

    It is JSONL by its ending, or if it begins with an object.

    Raises:
        DataError: the file is missing, empty or not UTF-8, a table (by its ending), or a line of
            JSONL cannot be used.
    """
    if (ending := Path(file).suffix).lower() in _TABLES and Path(file).exists():
        raise DataError(
            f"{os.fspath(file)}: {ending} files are not read as prompts: give JSONL, or a text file"
            " with a prompt in each line"
        )
    # Programs on Windows write a byte order mark, which is not part of the first line.
    content = read_text(file, error=DataError, limit=MAX_TEXT_BYTES, encoding="utf-8-sig")
    as_json = is_json_lines(file) or looks_like_json_lines(content)
    return parse_requests(content, os.fspath(file), adapter, as_json=as_json)


def parse_requests(
    content: str, source: str, adapter: AdapterSpec | None, *, as_json: bool
) -> list[InputPrompt]:
    """The prompts in `content`, one per line; blank lines are skipped.

    With `as_json`, each line is a JSON string or an object with `prompt`, `messages`, `text` or
    `audio` (a path). An object may also have `text_pair` beside `text`, `images` (paths), `adapter`
    instead of the argument `adapter`, and generation settings.
    `source`: the name of the content in messages.

    Raises:
        DataError: there are no prompts, or a line cannot be used.
    """
    requests = [
        _request(line, where, adapter) if as_json else InputPrompt(line, adapter, where=where)
        for where, line in numbered_lines(content, source)
    ]
    if not requests:
        raise DataError(f"{source} has no prompts")
    return requests


def _request(line: str, where: str, adapter: AdapterSpec | None) -> InputPrompt:
    values = json_line(where, line, error=DataError, expected='give {"prompt": "…"}')
    if isinstance(values, str):
        return InputPrompt(values, adapter, where=where)
    if not isinstance(values, dict):
        raise DataError(f'{where}: not an object, such as {{"prompt": "…"}}')
    return request_of(values, where, adapter)


def request_of(
    values: Mapping[str, Any], where: str, adapter: AdapterSpec | None = None
) -> InputPrompt:
    """The request described by an object of a JSONL line; see `parse_requests`.

    Raises:
        DataError: it has no prompt, a field of a wrong type, or chooses an adapter or a setting by
            another field.
    """
    _check_choice(values, where)
    _check_misspelled(values, where)
    audio = values.get("audio")
    name = next((name for name in _FIELDS if values.get(name) is not None), None)
    if isinstance(audio, str) and audio and name is None:
        name, values = "prompt", {**values, "prompt": ""}
    kind = list if name == "messages" else str
    if name is None or not isinstance(values[name], kind):
        raise DataError(
            f"{where}: give a text as prompt or text, a list of messages, or a path as audio"
        )
    named = values.get("adapter", adapter)
    if not (named is None or isinstance(named, str | dict)):
        raise DataError(f"{where}: adapter is not a name, no {{name: weight, …}} and not null")
    if named == "":
        raise DataError(f"{where}: adapter is an empty text: give a name, or null for the base")
    if (pair := values.get("text_pair")) is None:
        sound = audio if isinstance(audio, str) and audio else None
        images = {key: values[key] for key in _IMAGES if values.get(key)}
        return InputPrompt(values[name], named, _settings(values), sound, images, where)
    if name != "text" or not isinstance(pair, str):
        raise DataError(f"{where}: give a pair as two texts, text and text_pair")
    return InputPrompt((values[name], pair), named, _settings(values), where=where)


def looks_like_json_lines(content: str) -> bool:
    r"""Whether `content` is JSONL whatever its name: it begins with an object, `{"`.

    Otherwise its lines would be answered as texts, with their braces and names.
    """
    return re.match(r'\s*\{\s*"', content) is not None


def _check_choice(values: Mapping[str, Any], where: str) -> None:
    """Refuse other programs' fields for an adapter: if they were ignored, the base would answer."""
    for name, value in values.items():
        # Requests to OpenAI have a `model` too, which is harmless if `adapter` is set.
        chooses = name == "model" and "adapter" not in values
        if value is not None and name != "adapter" and (chooses or _CHOICE.search(name)):
            raise DataError(
                f"{where}: {shown(name)} is not read, and may choose an adapter: rename it to"
                " adapter (null is the base), or leave the field out"
            )


def _check_misspelled(values: Mapping[str, Any], where: str) -> None:
    """Refuse a field with almost the name of a setting: if ignored, it would have no effect."""
    for name, value in values.items():
        if value is None or name in _SETTINGS:
            continue
        if (near := _setting_like(name)) is not None:
            raise DataError(
                f"{where}: {shown(name)} is not read: name the setting {near}, or leave the field"
                " out"
            )


@lru_cache(maxsize=256)  # all rows of a file have the same fields
def _setting_like(name: str) -> str | None:
    """The setting that a field `name` may stand for, or None."""
    spelled = name.lower().replace("-", "_")
    if spelled in _SETTINGS:
        return spelled
    long = [setting for setting in _SETTINGS if len(setting) >= _LONG]
    near = get_close_matches(spelled, long, n=1, cutoff=_ALIKE)
    return _SYNONYMS.get(spelled) or next(iter(near), None)


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The generation settings in an object. Token ids are strings of digits in JSON objects."""
    found = {name: values[name] for name in _SETTINGS if values.get(name) is not None}
    if isinstance(bias := found.get("logit_bias"), dict):
        found["logit_bias"] = {
            int(token) if token.isascii() and token.isdigit() else token: value
            for token, value in bias.items()
        }
    return found
