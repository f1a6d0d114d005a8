"""Whisper's settings in generation_config.json: the initial tokens of a text, and timestamps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from loradeploy.errors import BundleError, shown

# Each of these fields shows that a file is for a speech model.
_MARKS: Final = ("lang_to_id", "task_to_id", "no_timestamps_token_id", "is_multilingual")


@dataclass(frozen=True)
class SpeechSettings:
    """The initial tokens of a transcript, and the rules for its timestamps.

    `languages`, `tasks`: tokens by name, such as "<|en|>" and "translate". `multilingual`: whether
    a language and a task may be given. `language`, `task`, `timestamps`: the model's defaults.
    `no_timestamps`: the token for no timestamps; in the vocabulary, the tokens of timestamps follow
    it. `max_initial_timestamp`: the maximum index of a text's first timestamp among these tokens.
    `max_length`: the maximum number of tokens of a text, without its initial tokens.
    """

    languages: Mapping[str, int] = field(default_factory=dict)
    tasks: Mapping[str, int] = field(default_factory=dict)
    multilingual: bool = True
    language: str | None = None
    task: str | None = None
    timestamps: bool = False
    no_timestamps: int | None = None
    max_initial_timestamp: int | None = None
    max_length: int | None = None


def check_speech_tokens(
    settings: SpeechSettings, begins: Iterable[int | None], vocabulary: int | None, where: str
) -> None:
    """Raise BundleError if a token is not in the vocabulary; `where` names the files.

    `begins`: the initial tokens of a text. `vocabulary`: its size, None if unknown.
    """
    named: list[tuple[str, int | None]] = [
        ("no_timestamps_token_id", settings.no_timestamps),
        *((f"lang_to_id {shown(name)}", token) for name, token in settings.languages.items()),
        *((f"task_to_id {shown(name)}", token) for name, token in settings.tasks.items()),
        *(("a token that a text begins with", token) for token in begins),
    ]
    for name, token in named:
        if vocabulary is not None and token is not None and token >= vocabulary:
            raise BundleError(
                f"{where}: {name} is {token}, the vocabulary ends at {vocabulary - 1}"
            )


def read_speech(values: Mapping[str, Any], where: str) -> SpeechSettings | None:
    """The settings in the object of a generation_config.json; None if it is not for speech.

    Raises:
        BundleError: a value has the wrong type; `where` names the file.
    """
    if not any(name in values for name in _MARKS):
        return None

    def of(name: str, kind: type[Any], least: int = 0) -> Any:
        value = values.get(name)
        fits = value is None or type(value) is kind
        if not fits or (kind is int and value is not None and value < least):
            raise BundleError(f"{where}: {name} is {shown(value)}")
        return value

    def tokens(name: str) -> dict[str, int]:
        found = values.get(name) or {}
        fits = isinstance(found, Mapping) and all(
            type(token) is int and token >= 0 for token in found.values()
        )
        if not fits:
            raise BundleError(f"{where}: {name} is {shown(found)}, expected an object of token ids")
        return dict(found)

    multilingual = of("is_multilingual", bool)
    return SpeechSettings(
        languages=tokens("lang_to_id"),
        tasks=tokens("task_to_id"),
        multilingual=True if multilingual is None else multilingual,
        language=of("language", str),
        task=of("task", str),
        timestamps=bool(of("return_timestamps", bool)),
        no_timestamps=of("no_timestamps_token_id", int),
        max_initial_timestamp=of("max_initial_timestamp_index", int),
        max_length=of("max_length", int, 1),
    )


def forced_tokens(values: Mapping[str, Any], where: str) -> tuple[int | None, ...]:
    """The tokens of `forced_decoder_ids`, which follow the first token; None: that of a language.

    Raises:
        BundleError: they are not pairs of consecutive positions, from 1, and tokens.
    """
    pairs = values.get("forced_decoder_ids") or []
    fits = isinstance(pairs, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and pair[0] == position
        and (pair[1] is None or (type(pair[1]) is int and pair[1] >= 0))
        for position, pair in enumerate(pairs, start=1)
    )
    if not fits:
        raise BundleError(
            f"{where}: forced_decoder_ids is {shown(pairs)}, expected [[1, token], [2, token], …]"
        )
    return tuple(token for _, token in pairs)
