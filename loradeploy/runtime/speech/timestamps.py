"""Whisper's timestamps: which tokens may follow, and the segments that they make of a text."""

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
    """What the tokens of a text with timestamps may be (transformers'
    WhisperTimeStampLogitsProcessor).

    They come in pairs, but for one at the end; none is before an earlier one; the first token is
    one, no later than `max_initial` from the first; and where all timestamps together are likelier
    than any other token, one of them is next. `no_timestamps`: the token before the first one.
    `end`: the first token that is no text.
    """

    no_timestamps: int
    end: int
    max_initial: int | None

    @property
    def first(self) -> int:
        """The first timestamp, of 0 seconds; those of more follow."""
        return self.no_timestamps + 1

    def __call__(self, scores: NDArray[np.floating], made: Sequence[int]) -> NDArray[np.floating]:
        """`scores` [vocabulary] without the tokens that may not follow those `made`."""
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
    """A segment of a window: its tokens, and where it is, in timestamps from the window's begin."""

    ids: tuple[int, ...]
    start: int
    end: int


def parts_of(ids: Sequence[int], first: int | None, steps: int) -> tuple[list[Part], int | None]:
    """The segments of a window's text, and the timestamp that the next window begins at.

    As transformers does it in long sounds: two timestamps in a row end a segment. What follows the
    last such pair is left out, as the window may have cut it: the next one begins there. None: the
    next one begins where this one ends, `steps` timestamps on, which it does where there is no
    pair, or a single timestamp is last. `first`: the first timestamp's token, None where there are
    none.
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
    """The tokens of `ids` that are text: no timestamps, no ends."""
    return [token for token in ids if (first is None or token < first) and token not in ends]
