"""Settings of generation in generation_config.json, except the end-of-text tokens."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, Final, Literal

from loradeploy.bundle.text.speech import SpeechSettings, forced_tokens, read_speech
from loradeploy.errors import BundleError, shown

MOST_LENGTH_PENALTY: Final = 20
# Settings that change texts and are not supported, with their values that have no effect.
_NOT_APPLIED: Final[Mapping[str, tuple[Any, ...]]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0, 0.0),
    "constraints": ([],),
    "force_words_ids": ([],),
    "renormalize_logits": (False,),
    "token_healing": (False,),
    "max_time": (),
    "sequence_bias": ([], {}),
    "forced_decoder_ids": ([],),
    "penalty_alpha": (0, 0.0),
    "guidance_scale": (1, 1.0),
    "encoder_repetition_penalty": (1, 1.0),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "dola_layers": (),
    "top_h": (),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "watermarking_config": ({},),
    "condition_on_prev_tokens": (False,),
    "compression_ratio_threshold": (),
    "logprob_threshold": (),
    "no_speech_threshold": (),
}


# Settings that are supported, by their names in a model's config.
_APPLIED: Final = (
    *("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "min_length"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "stop_strings"),
    *("top_k", "top_p", "min_p", "length_penalty", "early_stopping"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
)
# The configs inside a model's config in which transformers finds such settings, too.
_INNER: Final = ("decoder", "generator", "text_config")


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of generation, with transformers' names and definitions.

    `top_k`, `top_p`, `min_p`: parameters of sampling, None if the file has none.
    `length_penalty`, `early_stopping`: parameters of beam search.
    `stop_strings`: texts that end a generation.
    `decoder_start_token_id`: the first token of an encoder-decoder's target.
    `ignored`: settings in the file that would change the text and are not supported.
    `forced_decoder_ids`: the tokens after the first token of a transcript; None is a placeholder
    for the token of a language. `speech`: other settings of speech models.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop_strings: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    min_length: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    forced_decoder_ids: tuple[int | None, ...] = ()
    speech: SpeechSettings | None = None

    @cached_property
    def changes_scores(self) -> bool:
        """Whether the logits of any step are changed. Parameters of a search do not count."""
        return self.repetition_penalty != 1 or any(
            (
                self.no_repeat_ngram_size,
                self.min_new_tokens,
                self.suppress_tokens,
                self.begin_suppress_tokens,
                self.min_length,
                self.bad_words_ids,
                self.forced_bos_token_id is not None,
                self.forced_eos_token_id,
            )
        )


def is_length_penalty(value: object) -> bool:
    """Whether `value` is a number by which the lengths of beams can be weighted.

    A text's length to this power is finite, and so is a score divided by it.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return bool(-MOST_LENGTH_PENALTY <= value <= MOST_LENGTH_PENALTY)  # type: ignore[operator]


def settings_in_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of generation in a config.json, where older versions of transformers put them.

    transformers applies them if the model has no generation_config.json.
    """
    found = (config.get(name) for name in _INNER)
    inner: Mapping[str, Any] = next((each for each in found if isinstance(each, Mapping)), {})
    names = (*_APPLIED, *_NOT_APPLIED)
    values = {name: inner.get(name) if config.get(name) is None else config[name] for name in names}
    if config.get("force_bos_token_to_be_generated"):
        values["forced_bos_token_id"] = config.get("bos_token_id")
    return {name: value for name, value in values.items() if value is not None}


def read_settings(values: Mapping[str, Any], where: str) -> GenerationSettings:
    """The settings in the object of a generation_config.json; `where` names it in messages.

    Raises:
        BundleError: a value has the wrong type, or is out of range.
    """
    file = _File(values, where)
    top_k, top_p = values.get("top_k"), values.get("top_p")  # -1 and 2.0 mean no limit
    min_p = values.get("min_p")
    counted = values.get("min_new_tokens") is not None  # takes precedence, as in transformers
    speech = read_speech(values, where)
    return GenerationSettings(
        repetition_penalty=file.repetition_penalty(),
        no_repeat_ngram_size=file.count("no_repeat_ngram_size") or 0,
        min_new_tokens=file.count("min_new_tokens") or 0,
        suppress_tokens=file.tokens("suppress_tokens"),
        begin_suppress_tokens=file.tokens("begin_suppress_tokens"),
        top_k=top_k if isinstance(top_k, int) and top_k >= 0 else None,
        top_p=top_p if isinstance(top_p, int | float) and 0 < top_p <= 1 else None,
        min_p=min_p if isinstance(min_p, int | float) and 0 <= min_p <= 1 else None,
        length_penalty=file.length_penalty(),
        early_stopping=file.early_stopping(),
        stop_strings=file.texts("stop_strings"),
        min_length=0 if counted else file.count("min_length") or 0,
        bad_words_ids=file.words("bad_words_ids"),
        decoder_start_token_id=file.count("decoder_start_token_id"),
        forced_bos_token_id=file.count("forced_bos_token_id"),
        forced_eos_token_id=file.tokens("forced_eos_token_id"),
        forced_decoder_ids=() if speech is None else forced_tokens(values, where),
        speech=speech,
        ignored=tuple(
            name
            for name, harmless in _NOT_APPLIED.items()
            if values.get(name) is not None
            and values[name] not in harmless
            and not (speech is not None and name == "forced_decoder_ids")
        ),
    )


@dataclass(frozen=True)
class _File:
    """The object of a generation_config.json; null is as if a value were not there."""

    values: Mapping[str, Any]
    where: str

    def count(self, name: str) -> int | None:
        value = self.values.get(name)
        if value is not None and (type(value) is not int or not 0 <= value <= sys.float_info.max):
            raise self._wrong(name)
        return value

    def repetition_penalty(self) -> float:
        value = self.values.get("repetition_penalty")
        if value is None:
            return 1.0
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not 0 <= value <= sys.float_info.max:
            raise self._wrong("repetition_penalty")
        if value == 0:
            raise self._wrong("repetition_penalty", "more")
        return float(value)

    def length_penalty(self) -> float:
        value = self.values.get("length_penalty")
        if value is None:
            return 1.0
        if not is_length_penalty(value):
            raise self._wrong("length_penalty")
        return float(value)

    def early_stopping(self) -> bool | Literal["never"]:
        value: bool | Literal["never"] | None = self.values.get("early_stopping")
        if not isinstance(value, bool | None) and value != "never":
            raise self._wrong("early_stopping")
        return value or False

    def tokens(self, name: str) -> tuple[int, ...]:
        """A token or a list of tokens; a negative one stands for none."""
        value = self.values.get(name)
        listed = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
            raise self._wrong(name, "a list of token ids")
        return tuple(token for token in listed if token >= 0)

    def words(self, name: str) -> tuple[tuple[int, ...], ...]:
        listed = self.values.get(name) or []
        fits = isinstance(listed, list) and all(
            isinstance(word, list) and word and all(type(token) is int for token in word)
            for word in listed
        )
        if not fits:
            raise self._wrong(name, "a list of lists of token ids")
        return tuple(map(tuple, listed))

    def texts(self, name: str) -> tuple[str, ...]:
        """A text or a list of texts, none of them empty."""
        value = self.values.get(name) or []
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(s, str) and s for s in listed):
            raise self._wrong(name, "a list of texts")
        return tuple(listed)

    def _wrong(self, name: str, expected: str | None = None) -> BundleError:
        what = f"{self.where}: {name} is {shown(self.values.get(name))}"
        return BundleError(what if expected is None else f"{what}, expected {expected}")
