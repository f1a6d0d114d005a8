"""Change logits before a token is chosen.

In the order of transformers' logits processors, with vLLM's penalties after the first one:

logit_bias              is added
repetition_penalty      divides positive, multiplies negative logits of tokens in prompt or text
frequency_penalty       is subtracted once for each occurrence in the text
presence_penalty        is subtracted once if the token is in the text
no_repeat_ngram_size    excludes tokens that would repeat a sequence of this many tokens
min_new_tokens          excludes end tokens until there are this many generated tokens
bad_words_ids           excludes tokens that would complete one of these sequences
min_length              excludes end tokens until prompt and text have this length
allowed_tokens          excludes tokens outside its mask
forced_bos_token_id     replaces all that by this token after a prompt of a single token
forced_eos_token_id     replaces all that by these tokens at the last position of a text
suppress_tokens         excludes these, begin_suppress_tokens only at the first token
rule                    excludes by another rule, such as timestamps in a transcript
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from loradeploy.bundle.text.settings import GenerationSettings
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import UsageError, first_line, shown
from loradeploy.runtime.decoding.choosing.options import AllowedTokens, GenerationOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    # (logits [vocabulary], generated tokens) → changed logits.
    LogitsRule = Callable[[NDArray[np.floating], Sequence[int]], NDArray[np.floating]]


@dataclass(frozen=True)
class Processors:
    """The changes to the logits of one row.

    `own`: the settings in generation_config.json, overridden by the given ones. `ends`: the end
    tokens. `bias`: logit_bias by token id. `what`: the prompt's name in messages. `limit`: maximum
    number of generated tokens. `rule`: applied last.
    """

    own: GenerationSettings
    ends: Collection[int]
    bias: dict[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    allowed_tokens: AllowedTokens | None = None
    what: str = "prompt 1"
    limit: int | None = None
    rule: LogitsRule | None = None

    @classmethod
    def of(
        cls,
        options: GenerationOptions,
        own: GenerationSettings,
        tokenizer: Tokenizer,
        ends: Collection[int],
        what: str,
        limit: int | None = None,
        rule: LogitsRule | None = None,
    ) -> Processors:
        """The processors for `options`.

        Raises:
            UsageError: `logit_bias` has a text that is not one token, or not in the vocabulary.
        """
        given = {
            name: value
            for name in ("repetition_penalty", "no_repeat_ngram_size")
            if (value := getattr(options, name)) is not None
        }
        return cls(
            own=replace(own, **given),
            ends=ends,
            bias=_by_token(options, tokenizer),
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            allowed_tokens=options.allowed_tokens,
            what=what,
            limit=limit,
            rule=rule,
        )

    @property
    def _idle(self) -> bool:
        changing = self.bias or self.presence_penalty or self.frequency_penalty
        ruled = self.allowed_tokens or self.rule
        return not (changing or ruled or self.own.changes_scores)

    @np.errstate(over="ignore", invalid="ignore")  # overflows are refused below
    def __call__(
        self, logits: NDArray[np.floating], prompt: Sequence[int], made: Sequence[int]
    ) -> NDArray[np.floating]:
        """Return changed `logits` [vocabulary], after `prompt` and the generated tokens `made`.

        Raises:
            UsageError: no token is left, a logit is infinite, or a mask or a token that does not
                fit the logits.
        """
        if self._idle:
            return logits
        scores = logits.astype(np.float32)
        own = self.own
        for token, value in self.bias.items():
            if token >= scores.size:
                raise UsageError(
                    f"logit_bias names the token {shown(token)}, the logits end at"
                    f" {scores.size - 1}"
                )
            scores[token] += np.float32(value)
        before = np.array([*prompt, *made], np.int64)
        if own.repetition_penalty != 1:
            seen = np.unique(before)
            seen = seen[(seen >= 0) & (seen < scores.size)]  # a prompt may contain others
            values, penalty = scores[seen], np.float32(own.repetition_penalty)
            scores[seen] = np.where(values < 0, values * penalty, values / penalty)
        if made and (self.presence_penalty or self.frequency_penalty):
            tokens, counts = np.unique(np.array(made, np.int64), return_counts=True)
            taken = self.frequency_penalty * counts + self.presence_penalty
            scores[tokens] -= taken.astype(np.float32)
        _bar_repeated(scores, before, own.no_repeat_ngram_size)
        barred = _bad(own.bad_words_ids, before, self.ends)
        if len(made) < own.min_new_tokens or len(before) < own.min_length:
            barred += self.ends
        _bar(scores, barred)
        if self.allowed_tokens is not None:
            scores[~self._mask(tuple(made), scores.size)] = -np.inf
        opens = own.forced_bos_token_id is not None and len(prompt) == 1
        if opens and not made and own.forced_bos_token_id is not None:
            _force(scores, (own.forced_bos_token_id,))
        if own.forced_eos_token_id and self.limit is not None and len(made) == self.limit - 1:
            _force(scores, own.forced_eos_token_id)
        _bar(scores, own.suppress_tokens)
        if len(made) == (1 if opens else 0):
            _bar(scores, own.begin_suppress_tokens)
        if self.rule is not None and scores.max() > -np.inf:
            scores = self.rule(scores, made)
        if not scores.max() > -np.inf:
            raise UsageError(
                f"{self.what}: no token is allowed after {len(made)} generated ones"
                f" ({'its mask' if self.allowed_tokens else 'its settings'} excludes all of"
                f" {scores.size})"
            )
        if not scores.max() < np.inf:
            raise UsageError(
                f"{self.what}: logit_bias or a penalty is so large that a logit is infinite"
            )
        return scores

    def _mask(self, made: tuple[int, ...], size: int) -> NDArray[np.bool_]:
        assert self.allowed_tokens is not None
        given = self.allowed_tokens(made)
        if given is None:
            return np.ones(size, np.bool_)
        try:
            mask = np.asarray(given)
        except ValueError as problem:
            raise UsageError(
                f"{self.what}: allowed_tokens gave no array: {first_line(problem)}"
            ) from None
        if mask.dtype != np.bool_ or mask.ndim != 1:
            raise UsageError(
                f"{self.what}: allowed_tokens gave {mask.dtype} {list(mask.shape)}: give bool"
                f" [vocabulary], of {size} tokens, or None"
            )
        if mask.size > size and mask[size:].any():
            raise UsageError(
                f"{self.what}: allowed_tokens allows the token {size + int(mask[size:].argmax())},"
                f" the logits end at {size - 1}"
            )
        whole = np.zeros(size, np.bool_)
        whole[: mask.size] = mask[:size]
        return whole


def _bar(scores: NDArray[np.float32], tokens: Collection[int]) -> None:
    """Exclude `tokens`."""
    scores[[token for token in tokens if token < scores.size]] = -np.inf


def _force(scores: NDArray[np.float32], tokens: Sequence[int]) -> None:
    """Exclude all other tokens, and set the logits of `tokens` to 0."""
    scores[:] = -np.inf
    scores[[token for token in tokens if token < scores.size]] = 0.0


def _bad(
    words: Sequence[Sequence[int]], before: NDArray[np.int64], ends: Collection[int]
) -> list[int]:
    """The tokens that would complete one of `words` after `before`; not single end tokens."""
    return [
        word[-1]
        for word in words
        if not (len(word) == 1 and word[0] in ends)
        and len(before) >= len(word)
        and (len(word) == 1 or before[1 - len(word) :].tolist() == list(word[:-1]))
    ]


def _bar_repeated(scores: NDArray[np.float32], before: NDArray[np.int64], size: int) -> None:
    """Exclude tokens that would repeat a sequence of `size` tokens in `before`."""
    if not size or len(before) + 1 < size:
        return
    last = before[len(before) - size + 1 :]
    for start in range(len(before) - size + 1):
        if np.array_equal(before[start : start + size - 1], last):
            repeated = int(before[start + size - 1])
            if repeated < scores.size:
                scores[repeated] = -np.inf


def _by_token(options: GenerationOptions, tokenizer: Tokenizer) -> dict[int, float]:
    bias: dict[int, float] = {}
    name = tokenizer.special_tokens.get("unk_token")
    for token, value in (options.logit_bias or {}).items():
        if isinstance(token, str):
            ids = tokenizer.encode(token, special_tokens=False)
            if len(ids) != 1:
                raise UsageError(
                    f"logit_bias names the text {shown(token)}, which is {len(ids)} tokens"
                    f" {shown(ids)}, expected 1: give token ids"
                )
            if name not in (None, token) and ids[0] == tokenizer.vocabulary.get(str(name)):
                raise UsageError(
                    f"logit_bias names the text {shown(token)}, which the vocabulary does not have:"
                    f" it would be that of {name}"
                )
            token = ids[0]
        bias[int(token)] = bias.get(int(token), 0.0) + float(value)
    return bias
