"""Prompts in files: one a line, or JSONL whose objects may name an adapter each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from loradeploy.errors import DataError, shown
from loradeploy.files import (
    MAX_TEXT_BYTES,
    is_json_lines,
    json_line,
    numbered_lines,
    read_text,
)
from loradeploy.runtime.decoding.choosing.options import GenerationOptions

if TYPE_CHECKING:
    from loradeploy.runtime.adapters.resident import AdapterSpec

# The first of these that an object has is the prompt.
_FIELDS: Final = ("prompt", "messages", "text")
# Fields by which other programs choose an adapter: adapters, adapter_name, lora, lora_request.
_CHOICE: Final = re.compile(r"adapter|(?:^|_)lora", re.IGNORECASE)
# Fields by which data of vision-language models names what a text is about.
_IMAGES: Final = ("image", "images", "image_url", "pixel_values", "video", "videos")
# What an object may set of its own generation; a function is nothing that JSON has.
_SETTINGS: Final = (
    *(option.name for option in fields(GenerationOptions) if option.name != "allowed_tokens"),
    "seed",
)


@dataclass(frozen=True)
class InputPrompt:
    """A prompt and its adapter: a name, a path, several with weights, or None for the base.

    `prompt`: a text, a pair of texts, or a conversation as a list of messages. `settings`:
    those of its generation that it has itself, by the names of `GenerationOptions`, and `seed`.
    `audio`: the path of a sound, which a speech recognizer takes in place of the prompt.
    `images`: the field of the object that has images or a video, which are not read here.
    """

    prompt: str | tuple[str, str] | list[Any]
    adapter: AdapterSpec | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    audio: str | None = None
    images: str | None = None


def read_requests(
    file: str | os.PathLike[str], adapter: AdapterSpec | None = None
) -> list[InputPrompt]:
    """The prompts in a file, by its ending plain text or JSONL; see `parse_requests`.

    Raises:
        DataError: the file is missing, empty or no UTF-8, or a line of JSONL cannot be used.
    """
    # Programs of Windows begin a file with a byte order mark, which is no part of its first line.
    content = read_text(file, error=DataError, limit=MAX_TEXT_BYTES, encoding="utf-8-sig")
    as_json = is_json_lines(file)
    return parse_requests(content, os.fspath(file), adapter, as_json=as_json)


def parse_requests(
    content: str, source: str, adapter: AdapterSpec | None = None, *, as_json: bool = False
) -> list[InputPrompt]:
    """The prompts in `content`, one a line; blank lines are passed over.

    With `as_json` a line is a JSON text, or an object with `prompt`, `messages`, `text` or the path
    `audio`, perhaps `text_pair` beside `text`, and perhaps `adapter` in place of the one that all
    others have, and settings of a generation.
    `source`: its name in messages.

    Raises:
        DataError: there are no prompts, or a line cannot be used.
    """
    requests = [
        _request(line, where, adapter) if as_json else InputPrompt(line, adapter)
        for where, line in numbered_lines(content, source)
    ]
    if not requests:
        raise DataError(f"{source} has no prompts")
    return requests


def _request(line: str, where: str, adapter: AdapterSpec | None) -> InputPrompt:
    values = json_line(where, line, error=DataError, expected='give {"prompt": "…"}')
    if isinstance(values, str):
        return InputPrompt(values, adapter)
    if not isinstance(values, dict):
        raise DataError(f'{where}: not an object, such as {{"prompt": "…"}}')
    return request_of(values, where, adapter)


def request_of(
    values: Mapping[str, Any], where: str, adapter: AdapterSpec | None = None
) -> InputPrompt:
    """The request of an object as a line of JSONL has it; see `parse_requests`.

    Raises:
        DataError: it has no prompt, something of another type, or names an adapter otherwise.
    """
    _check_choice(values, where)
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
        images = next((key for key in _IMAGES if values.get(key)), None)
        return InputPrompt(values[name], named, _settings(values), sound, images)
    if name != "text" or not isinstance(pair, str):
        raise DataError(f"{where}: give a pair as two texts, text and text_pair")
    return InputPrompt((values[name], pair), named, _settings(values))


def _check_choice(values: Mapping[str, Any], where: str) -> None:
    """Refuse a field that chooses an adapter elsewhere; passed over, the base would answer."""
    for name, value in values.items():
        # Where the adapter is given, a model is what OpenAI's requests have beside it.
        chooses = name == "model" and "adapter" not in values
        if value is not None and name != "adapter" and (chooses or _CHOICE.search(name)):
            raise DataError(
                f"{where}: {shown(name)} is not read, and may be to choose an adapter: name it as"
                " adapter (null is the base), or leave the field out"
            )


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a generation that an object has; in JSON a token id is a text of digits."""
    found = {name: values[name] for name in _SETTINGS if values.get(name) is not None}
    if isinstance(bias := found.get("logit_bias"), dict):
        found["logit_bias"] = {
            int(token) if token.isascii() and token.isdigit() else token: value
            for token, value in bias.items()
        }
    return found
