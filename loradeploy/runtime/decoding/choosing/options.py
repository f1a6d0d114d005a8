"""Generation settings, each checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

import numpy as np

from loradeploy.bundle.text.settings import MOST_LENGTH_PENALTY, is_length_penalty
from loradeploy.errors import UsageError, listed_names, shown
from loradeploy.given_numbers import checked_count, checked_number
from loradeploy.runtime.decoding.choosing.sampling import Sampling

if TYPE_CHECKING:
    from numpy.typing import NDArray

# From the generated tokens to the allowed next tokens, bool [vocabulary]; None allows all.
AllowedTokens = Callable[[tuple[int, ...]], "NDArray[np.bool_] | None"]
# Options that are integers, with their smallest values; the others may be None. Then numbers.
_REQUIRED: Final = {"max_new_tokens": 1, "n": 1, "num_beams": 1}
_COUNTS: Final = {**_REQUIRED, "top_k": 0, "no_repeat_ngram_size": 0, "logprobs": 0}
# Texts of one prompt, each of which has a random generator.
_MOST_TEXTS: Final = 2**16
_NUMBERS: Final = (
    *("temperature", "top_p", "min_p", "length_penalty"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


class GenerationFlags(TypedDict, total=False):
    """The fields of `GenerationOptions`, as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int | None
    logit_bias: Mapping[int | str, float] | None
    stop: str | Sequence[str] | None
    n: int
    num_beams: int
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    logprobs: int | None
    allowed_tokens: AllowedTokens | None


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class GenerationOptions:
    """Generation settings of one prompt. docs/generation.md defines each of them.

    If repetition_penalty, no_repeat_ngram_size, stop, when sampling top_k, top_p or min_p, or with
    beams length_penalty or early_stopping is None, the value in the row's generation_config.json is
    used, if there is one.

    Raises:
        UsageError: a value out of range, or settings that contradict each other.
    """

    max_new_tokens: int = _option(32, "maximum number of generated tokens")
    temperature: float = _option(0.0, "0 is greedy; above 0, tokens are sampled with the seed")
    top_k: int | None = _option(None, "sample from this many most likely tokens, 0 for all")
    top_p: float | None = _option(None, "sample from the most likely tokens of this probability")
    min_p: float | None = _option(
        None, "sample from tokens of at least this fraction of the highest probability"
    )
    repetition_penalty: float | None = _option(
        None, "divides the logits of tokens in the prompt or the text"
    )
    presence_penalty: float = _option(0.0, "subtracted from the logits of tokens in the text")
    frequency_penalty: float = _option(
        0.0, "subtracted from a token's logit once per occurrence in the text"
    )
    no_repeat_ngram_size: int | None = _option(None, "no sequence of this many tokens occurs twice")
    logit_bias: Mapping[int | str, float] | None = _option(
        None, "added to logits, by token id or by a text of one token"
    )
    stop: str | Sequence[str] | None = _option(None, "stop strings; the text ends before them")
    n: int = _option(1, "number of texts per prompt: samples, or best beams")
    num_beams: int = _option(1, "beam search, if 2 or more")
    length_penalty: float | None = _option(
        None, "a beam's score is divided by its length to this power"
    )
    early_stopping: bool | Literal["never"] | None = _option(
        None, 'when beam search ends: True, False or "never"'
    )
    logprobs: int | None = _option(
        None, "give each token's log-probability, and this many most likely tokens at its position"
    )
    allowed_tokens: AllowedTokens | None = field(
        default=None,
        metadata={
            "help": "a function from generated tokens to a mask of allowed ones, bool [vocabulary]"
        },
    )

    @classmethod
    def of(cls, *given: Mapping[str, Any]) -> GenerationOptions:
        """Settings by name; later mappings override earlier ones.

        Raises:
            UsageError: as the class, or an unknown name.
        """
        known = [known.name for known in fields(cls)]
        merged: dict[str, Any] = {}
        for values in given:
            merged.update(values)
        if unknown := [name for name in merged if name not in known]:
            raise UsageError(
                f"{shown(unknown[0])} is not a setting of a generation; there are:"
                f" {listed_names(known, len(known), width=1000)}"
            )
        return cls(**merged)

    def __post_init__(self) -> None:
        self._convert()
        Sampling(
            self.temperature,
            0 if self.top_k is None else self.top_k,
            1.0 if self.top_p is None else self.top_p,
            0.0 if self.min_p is None else self.min_p,
        )
        self._check_penalties()
        _check_bias(self.logit_bias)
        for text in self.stops:
            if not isinstance(text, str):
                raise UsageError(f"stop is {shown(self.stop)}: give a text, or a list of texts")
            if not text:
                raise UsageError("a stop string is empty: every text would end immediately")
        if self.allowed_tokens is not None and not callable(self.allowed_tokens):
            raise UsageError(
                f"allowed_tokens is {shown(self.allowed_tokens)}: give a function of token ids"
            )
        self._check_beams()

    def _convert(self) -> None:
        """Convert numbers to Python's types; what is no number is refused by later checks."""
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if value is not None or name in _REQUIRED:
                object.__setattr__(self, name, checked_count(name, value, least))
        for name in _NUMBERS:
            if (number := checked_number(getattr(self, name))) is not None:
                object.__setattr__(self, name, number)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        if isinstance(self.stop, str):
            return (self.stop,)
        if not isinstance(self.stop, Sequence):
            raise UsageError(f"stop is {shown(self.stop)}: give a text, or a list of texts")
        return tuple(self.stop)

    def _check_penalties(self) -> None:
        penalty = self.repetition_penalty
        if penalty is not None and not 0 < (checked_number(penalty) or 0) < float("inf"):
            raise UsageError(
                f"repetition_penalty is {shown(penalty)}: give a number above 0, 1 for none"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if checked_number(value) is None or not -float("inf") < value < float("inf"):
                raise UsageError(f"{name} is {shown(value)}: give a number, 0 for none")

    def _check_beams(self) -> None:
        if self.n > _MOST_TEXTS:
            raise UsageError(f"n is {self.n}: give at most {_MOST_TEXTS}")
        if self.num_beams == 1:
            for name in ("length_penalty", "early_stopping"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"{name} has no effect without beams: give num_beams of 2 or more"
                    )
            if self.n > 1 and self.temperature == 0:
                raise UsageError(
                    f"n is {self.n} at temperature 0, where all {self.n} texts would be the same:"
                    " give a temperature, or num_beams"
                )
            return
        if self.temperature > 0:
            raise UsageError(
                f"num_beams is {self.num_beams} and temperature is {self.temperature}: beam search"
                " does not sample, give one of the two"
            )
        if self.n > self.num_beams:
            raise UsageError(f"n is {self.n}, of only {self.num_beams} beams: give more num_beams")
        if self.logprobs is not None:
            raise UsageError(
                "logprobs are not available for beams: score the text with TextGenerator.score"
            )
        penalty = self.length_penalty
        if penalty is not None and not is_length_penalty(penalty):
            most = MOST_LENGTH_PENALTY
            raise UsageError(
                f"length_penalty is {shown(penalty)}: give a number from -{most} to {most}"
            )
        early = self.early_stopping
        kind = isinstance(early, bool | str | None)  # `in` would accept 1 for True
        if not kind or early not in (None, True, False, "never"):
            raise UsageError(
                f'early_stopping is {shown(self.early_stopping)}: give True, False or "never"'
            )


def _check_bias(bias: object) -> None:
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise UsageError(f"logit_bias is {shown(bias)}: give a mapping of token ids to numbers")
    for token, value in bias.items():
        if not (isinstance(token, str) or _whole(token, 0)):
            raise UsageError(
                f"logit_bias names {shown(token)}: give token ids, or texts that are one token"
            )
        if checked_number(value) is None or not value < float("inf"):  # -inf excludes a token
            raise UsageError(
                f"logit_bias of {shown(token)} is {shown(value)}: give a number, or -inf to"
                " exclude it"
            )


def _whole(value: object, least: int) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and value >= least  # type: ignore[operator]
