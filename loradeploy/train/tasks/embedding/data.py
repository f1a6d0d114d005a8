"""Read and check training examples for embedders.

A row has `anchor`, `positive` and optionally `negative`; or `text`, `text_pair` and `score`.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any, Final

from loradeploy.errors import DataError
from loradeploy.train.data.examples import non_empty, number_in, text_of
from loradeploy.train.data.sources import Row, Source, rows

RANKED: Final = ("anchor", "positive")
SCORED: Final = ("text", "text_pair", "score")


@dataclass(frozen=True)
class TextPair:
    """An example in which `positive` belongs to `anchor`, and `negative` does not."""

    where: str
    anchor: str
    positive: str
    negative: str | None

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts in the order of the model's rows."""
        return tuple(t for t in (self.anchor, self.positive, self.negative) if t is not None)


@dataclass(frozen=True)
class ScoredPair:
    """Two texts, and a score of their similarity."""

    where: str
    text: str
    pair: str
    score: float

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts in the order of the model's rows."""
        return (self.text, self.pair)


def read_text_pairs(source: Source, *, triplets: bool = False) -> list[TextPair]:
    """The examples with an anchor and a positive; `triplets`: a negative is required, too.

    Raises:
        DataError: there are no examples, a row (named) lacks a text or is a scored pair, or only
            some rows have a negative.
    """
    examples = []
    for where, row in rows(source, RANKED):
        _check_form(where, row, RANKED, SCORED, "cosent or cosine")
        anchor, positive = (text_of(where, row, name) for name in RANKED)
        negative = None if row.get("negative") is None else text_of(where, row, "negative")
        if triplets and negative is None:
            raise DataError(f'{where}: has no negative, which `embedding_loss="triplet"` needs')
        examples.append(TextPair(where, anchor, positive, negative))
    non_empty(examples, source)
    for example in examples:
        if (example.negative is None) != (examples[0].negative is None):
            raise DataError(f"{example.where}: some rows have a negative and others have none")
    return examples


def read_scored_pairs(source: Source, *, bounded: bool = False) -> list[ScoredPair]:
    """The examples with two texts and a score; `bounded`: from -1 to 1, like cosines.

    Raises:
        DataError: there are no examples, or a row (named) lacks a text, has a score that is not a
            number or is out of bounds, or has an anchor and a positive.
    """
    examples = []
    for where, row in rows(source, SCORED):
        _check_form(where, row, SCORED, RANKED, "ranking or triplet")
        text, pair = (text_of(where, row, name) for name in SCORED[:2])
        examples.append(ScoredPair(where, text, pair, _score(where, row.get("score"), bounded)))
    return non_empty(examples, source)


def is_scored(first: Row) -> bool:
    """Whether data with the `first` row has scored pairs."""
    return "score" in first[1]


def _check_form(
    where: str, row: dict[str, Any], needed: tuple[str, ...], other: tuple[str, ...], losses: str
) -> None:
    if not any(name in row for name in needed) and all(name in row for name in other):
        raise DataError(
            f"{where}: has {', '.join(other)}, which is data for `embedding_loss` {losses}; this"
            f" run needs {', '.join(needed)}"
        )


def _score(where: str, value: Any, bounded: bool) -> float:
    score = number_in(value)
    if not math.isfinite(score):
        raise DataError(f"{where}: score is {reprlib.repr(value)}, expected a number")
    if bounded and not -1 <= score <= 1:
        raise DataError(
            f'{where}: score is {score:g}: `embedding_loss="cosine"` needs -1 to 1, "cosent" takes'
            " any scale"
        )
    return score
