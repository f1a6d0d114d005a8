"""Aggregate labels of tokens to entities, like transformers' TokenClassificationPipeline.

none      each token separately
simple    adjacent tokens of one kind are an entity
first     like simple with whole words, each with the label of its first token
average   likewise, with the label of the highest average probability of its tokens
max       likewise, with the label of its most likely token

B-X begins an entity of the kind X, I-X continues one; other labels are kinds themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NONE: Final = "none"
SIMPLE: Final = "simple"
# The label of tokens outside entities.
OUTSIDE: Final = "O"


@dataclass(frozen=True)
class Entity:
    """Characters `start` to `end` of a text, their label, and its probability.

    `label`: for a token, the classifier's label; for several tokens, without B- and I-.
    `word`: the tokens as text; `text[start:end]` is the original text.
    `index`: the index of the token, if it is a single one.
    """

    label: str
    score: float
    word: str
    start: int
    end: int
    index: int | None = None


@dataclass(frozen=True)
class Token:
    """A token of a text, with the probability of each label, float [labels].

    `continues`: whether it continues the word of the token before it.
    """

    word: str
    scores: NDArray[Any]
    start: int
    end: int
    index: int
    continues: bool


# From probabilities [tokens, labels] of a word to the index and probability of its label.
_WORDS: Final[Mapping[str, Callable[[NDArray[Any]], tuple[int, float]]]] = {
    "first": lambda scores: _most_likely(scores[0]),
    "average": lambda scores: _most_likely(np.nanmean(scores, axis=0)),
    "max": lambda scores: _most_likely(scores[int(scores.max(axis=1).argmax())]),
}
AGGREGATIONS: Final = (NONE, SIMPLE, *_WORDS)


def entities_of(
    tokens: Sequence[Token],
    labels: Sequence[str],
    aggregation: str,
    join: Callable[[Sequence[str]], str],
    ignored: Collection[str],
) -> list[Entity]:
    """The entities of the `tokens` of a text, or of a part of it, without those labeled `ignored`.

    `join`: converts words of tokens to text.
    """
    if aggregation in _WORDS:
        found = [_word(word, labels, _WORDS[aggregation], join) for word in _words(tokens)]
    else:
        found = [_token(token, labels) for token in tokens]
    if aggregation != NONE:
        found = [_group(group, join) for group in _groups(found)]
    return [entity for entity in found if entity.label not in ignored]


def without_overlaps(entities: Sequence[Entity]) -> list[Entity]:
    """Remove overlaps between parts: if an entity begins inside another, keep the longer one.

    If they are equally long, keep the one with the higher probability.
    """
    kept: list[Entity] = []
    for entity in sorted(entities, key=lambda entity: entity.start):
        last = kept[-1] if kept else None
        if last is None or not last.start <= entity.start < last.end:
            kept.append(entity)
        elif (entity.end - entity.start, entity.score) > (last.end - last.start, last.score):
            kept[-1] = entity
    return kept


def tag_of(label: str) -> tuple[str, str]:
    """Whether a label begins ("B") or continues ("I") an entity, and the kind of entity."""
    if label[:2] in ("B-", "I-"):
        return label[0], label[2:]
    return "I", label


def _most_likely(scores: NDArray[Any]) -> tuple[int, float]:
    number = int(scores.argmax())
    return number, float(scores[number])


def _token(token: Token, labels: Sequence[str]) -> Entity:
    number, score = _most_likely(token.scores)
    return Entity(labels[number], score, token.word, token.start, token.end, token.index)


def _words(tokens: Sequence[Token]) -> list[list[Token]]:
    words: list[list[Token]] = []
    for token in tokens:
        if words and token.continues:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _word(
    tokens: Sequence[Token],
    labels: Sequence[str],
    choose: Callable[[NDArray[Any]], tuple[int, float]],
    join: Callable[[Sequence[str]], str],
) -> Entity:
    number, score = choose(np.stack([token.scores for token in tokens]))
    word = join([token.word for token in tokens])
    return Entity(labels[number], score, word, tokens[0].start, tokens[-1].end)


def _groups(entities: Sequence[Entity]) -> list[list[Entity]]:
    groups: list[list[Entity]] = []
    for entity in entities:
        begins, kind = tag_of(entity.label)
        if groups and begins != "B" and kind == tag_of(groups[-1][-1].label)[1]:
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return groups


def _group(entities: Sequence[Entity], join: Callable[[Sequence[str]], str]) -> Entity:
    return Entity(
        label=entities[0].label.split("-", 1)[-1],
        score=float(np.nanmean([entity.score for entity in entities])),
        word=join([entity.word for entity in entities]),
        start=entities[0].start,
        end=entities[-1].end,
    )
