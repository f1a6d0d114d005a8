"""Whisper's timestamps: which tokens may follow, and the segments of a text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loradeploy.runtime.decoding.choosing.logprobs import log_softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TimestampRules:
    """The rules for tokens of a text with timestamps, as in WhisperTimeStampLogitsProcessor.

    Timestamps come in pairs, except for one at the end, and do not decrease. The first token is a
    timestamp, at most `max_initial` after the first one. If all timestamps together are more likely
    than any other token, the next token is a timestamp. `no_timestamps`: the token before the first
    timestamp. `end`: the first token that is not text.
    """

    no_timestamps: int
    end: int
    max_initial: int | None

    @property
    def first(self) -> int:
        """The first timestamp's token, for 0 seconds; later timestamps follow."""
        return self.no_timestamps + 1

    def __call__(self, scores: NDArray[np.floating], made: Sequence[int]) -> NDArray[np.floating]:
        """Exclude from `scores` [vocabulary] the tokens that must not follow `made`."""
        scores, first = scores.astype(np.float32), self.first  # a copy
        scores[self.no_timestamps] = -np.inf
        last_is = bool(made) and made[-1] >= first
        one_before_is = len(made) < 2 or made[-2] >= first
        if last_is and one_before_is:
            scores[first:] = -np.inf
        elif last_is:
            scores[: self.end] = -np.inf
        if times := [token for token in made if token >= first]:
            scores[first : times[-1] + (not (last_is and not one_before_is))] = -np.inf
        if not made:
            scores[:first] = -np.inf
            if self.max_initial is not None:
                scores[first + self.max_initial + 1 :] = -np.inf
        logprobs = log_softmax(scores)
        with np.errstate(divide="ignore"):
            together = np.log(np.exp(logprobs[first:]).sum())
        if together > logprobs[:first].max():
            scores[:first] = -np.inf
        return scores


@dataclass(frozen=True)
class Part:
    """A segment of a window: its tokens, start and end, in timestamps from the window's start."""

    ids: tuple[int, ...]
    start: int
    end: int


def parts_of(ids: Sequence[int], first: int | None, steps: int) -> tuple[list[Part], int | None]:
    """The segments of a window's text, and the timestamp at which the next window starts.

    As in transformers for long audio, two consecutive timestamps end a segment. The text after the
    last pair is dropped, because the window may have cut it, and the next window starts there. If
    there is no pair, or the text ends with a single timestamp, the next window starts where this
    one ends, after `steps` timestamps, which is returned as None. `first`: the first timestamp's
    token, None for models without timestamps.
    """
    times = [first is not None and token >= first for token in ids]
    zero = 0 if first is None else first
    pairs = [at + 1 for at in range(len(times) - 1) if times[at] and times[at + 1]]
    if not pairs:
        end, last = steps, next((token for token in reversed(ids) if token >= zero), zero)
        if first is not None and last != zero:
            end = last - zero
        return [Part(tuple(ids), 0, end)], None
    single = times[-2:] == [False, True]
    cuts = [*pairs, len(ids)] if single else [*pairs[:-1], pairs[-1] + 1]
    parts, begin = [], 0
    for number, cut in enumerate(cuts):
        some = ids[begin:cut]
        ending = -1 if single or number < len(cuts) - 1 else -2
        parts.append(Part(tuple(some), max(0, some[0] - zero), max(0, some[ending] - zero)))
        begin = cut
    return parts, None if single else ids[begin - 2] - zero


def text_tokens(ids: Sequence[int], first: int | None, ends: Collection[int]) -> list[int]:
    """The tokens of `ids` that are text: no timestamps and no end tokens."""
    return [token for token in ids if (first is None or token < first) and token not in ends]
