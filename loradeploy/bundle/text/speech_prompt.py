"""The initial tokens of a transcript: start, language, task, and whether it has timestamps.

They are those of transformers' `generate` for Whisper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from loradeploy.bundle.audio.languages import language_token
from loradeploy.bundle.text.speech import SpeechSettings
from loradeploy.errors import UsageError, listed_names, shown

TASKS: Final = ("transcribe", "translate")
_TRANSCRIBE: Final = TASKS[0]


@dataclass(frozen=True)
class SpeechPrompt:
    """The initial tokens of one transcript.

    `start`: its first token. `forced`: the tokens after it if neither a language nor a task is
    given. `language`, `task`: the given ones, or else the model's. `what`: the name of the
    transcript in messages.

    Raises:
        UsageError: the model does not have the language or the task, or has no token for
            timestamps.
    """

    start: int
    settings: SpeechSettings
    forced: tuple[int | None, ...]
    language: str | None
    task: str | None
    timestamps: bool
    what: str

    def __post_init__(self) -> None:
        own = self.settings
        if self.task is not None and self.task not in TASKS:
            raise UsageError(f"`task` is {shown(self.task)}: give one of {', '.join(TASKS)}")
        if self.task is not None and self.task not in own.tasks:
            raise UsageError(
                f"{self.what}: the model has no token of the task {self.task!r} (task_to_id in"
                " generation_config.json): give no `task`"
            )
        if self.language is not None:
            self._token_of(self.language)
        if self.timestamps and own.no_timestamps is None:
            raise UsageError(
                f"{self.what}: the model has no timestamps (generation_config.json has no"
                " no_timestamps_token_id)"
            )

    @classmethod
    def of(
        cls,
        start: int,
        settings: SpeechSettings,
        forced: tuple[int | None, ...],
        *,
        language: str | None,
        task: str | None,
        timestamps: bool,
        what: str,
    ) -> SpeechPrompt:
        """Build a prompt from the given values, with the model's `settings` as defaults.

        Raises:
            UsageError: as the class, or a language or task is given for an English-only model.
        """
        if not settings.multilingual and not (language is None and task is None):
            raise UsageError(f"{what}: the model is English-only: give no `language` or `task`")
        language = settings.language if language is None else language
        task = settings.task if task is None else task
        unforced = not (language is None and task is None)
        given = () if unforced else forced
        return cls(start, settings, given, language, task, timestamps, what)

    @property
    def needs_language(self) -> bool:
        """Whether the language must be detected from the audio."""
        open_ = not self.forced or self.forced[0] is None
        return self.language is None and bool(self.settings.languages) and open_

    def tokens(self, found: int | None = None) -> list[int]:
        """The tokens. `found`: the token of the detected language, if `needs_language`."""
        own = self.settings
        tokens: list[int | None] = [self.start, *self.forced]
        spoken = found if self.language is None else self._token_of(self.language)
        if spoken is not None:
            tokens[1:2] = [spoken]
        if self.task is not None:
            tokens.append(own.tasks[self.task])
        elif self.language is not None and not {*own.tasks.values()} & {*tokens}:
            tokens.append(own.tasks.get(_TRANSCRIBE))
        if not self.timestamps and own.no_timestamps not in (None, tokens[-1]):
            tokens.append(own.no_timestamps)
        elif self.timestamps and tokens[-1] == own.no_timestamps:
            tokens.pop()
        return [token for token in tokens if token is not None]

    def language_of(self, tokens: list[int]) -> str | None:
        """The code of the language in the initial `tokens`; None if there is none."""
        names = {token: name for name, token in self.settings.languages.items()}
        name = names.get(tokens[1]) if len(tokens) > 1 else None
        return None if name is None else name.strip("<|>")

    def _token_of(self, language: str) -> int:
        if not isinstance(language, str):
            raise UsageError(
                f"{self.what}: `language` is {shown(language)}: give a code such as en"
            )
        known = self.settings.languages
        token = known.get(language.strip().lower(), known.get(language_token(language)))
        if token is None:
            codes = [name.strip("<|>") for name in known]
            raise UsageError(
                f"{self.what}: the language {shown(language)} is not one of the model's:"
                f" {listed_names(codes, len(codes), width=1000) if codes else 'it has none'}"
            )
        return token
