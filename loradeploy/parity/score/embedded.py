"""Held-out data of an embedder: its texts, and the task that their vectors are scored on.

Pairs of an anchor and a positive are scored as retrieval: each distinct anchor is a query, and all
sampled positives and negatives are the documents. Pairs with a score are scored by the correlation
of the cosine of their vectors with that score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.text.vectors.recipe import SentenceRecipe
from loradeploy.bundle.text.vectors.steps import normalize
from loradeploy.errors import DataError
from loradeploy.parity.score.measures import RETRIEVAL, SIMILARITY, retrieval_counts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Counts = NDArray[np.float64]

# A text: its tokens, and the number of leading tokens of a prompt that is excluded from pooling.
Text = tuple[tuple[int, ...], int]


@dataclass(frozen=True)
class Retrieval:
    """A retrieval task. `queries`, `documents`: indices of texts.

    `relevant`: for each query, the indices of its relevant documents in `documents`.
    """

    queries: tuple[int, ...]
    documents: tuple[int, ...]
    relevant: tuple[tuple[int, ...], ...]
    kind: str = RETRIEVAL

    def __len__(self) -> int:
        return len(self.queries)

    def counts(self, vectors: NDArray[Any]) -> Counts:
        """Return reciprocal rank and recalls, [queries, 3], of unit `vectors` [texts, size]."""
        similar = vectors[list(self.queries)] @ vectors[list(self.documents)].T
        rows = zip(similar, self.relevant, strict=True)
        return np.stack([retrieval_counts(row, relevant) for row, relevant in rows])


@dataclass(frozen=True)
class Similarity:
    """A similarity task. `pairs`: indices of texts; `scores`: the similarity of each pair."""

    pairs: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]
    kind: str = SIMILARITY

    def __len__(self) -> int:
        return len(self.pairs)

    def counts(self, vectors: NDArray[Any]) -> Counts:
        """Return cosine and score, [pairs, 1, 2], of unit `vectors` [texts, size]."""
        first, second = (vectors[list(side)] for side in zip(*self.pairs, strict=True))
        return np.stack([(first * second).sum(axis=1), np.array(self.scores)], axis=1)[:, None]


@dataclass(frozen=True, eq=False)
class Embedded:
    """Texts, the `recipe` that makes vectors of them, and the task they are scored on."""

    texts: tuple[Text, ...]
    compared: Retrieval | Similarity
    recipe: SentenceRecipe

    def vector(self, values: NDArray[Any], number: int) -> Any:
        """Return the unit vector [size] of the text `number` from the graph's output.

        `values`: the states of its tokens, [tokens, hidden], or one vector, [hidden].
        """
        if values.ndim == 1:
            return normalize(self.recipe.scaled(values[None]).astype(np.float64))[0]
        tokens, unpooled = self.texts[number]
        states, mask = values[None, : len(tokens)], np.ones((1, len(tokens)), np.int64)
        vectors = self.recipe.vectors(states, mask, unpooled)
        return normalize(vectors.astype(np.float64))[0]


def embedded(
    features: Sequence[dict[str, Any]], recipe: SentenceRecipe, *, scored: bool
) -> Embedded:
    """Make held-out data of tokenized examples (`train.tasks.embedding.features`).

    Raises:
        DataError: there is only one document, or all scores are equal.
    """
    texts: dict[Text, int] = {}

    def number(feature: dict[str, Any], part: str) -> int:
        text = (tuple(feature[part]), feature.get("unpooled", {}).get(part, 0))
        return texts.setdefault(text, len(texts))

    if scored:
        pairs = tuple((number(f, "input_ids"), number(f, "positive")) for f in features)
        scores = tuple(float(feature["labels"]) for feature in features)
        if len(set(scores)) < 2:
            raise DataError(
                f"all pairs have the score {scores[0]:g}, which nothing correlates with: give"
                " pairs of different scores"
            )
        return Embedded(tuple(texts), Similarity(pairs, scores), recipe)
    belongs: dict[int, list[int]] = {}
    documents: dict[int, int] = {}
    for feature in features:
        own = number(feature, "positive")
        place = documents.setdefault(own, len(documents))
        belongs.setdefault(number(feature, "input_ids"), []).append(place)
        if "negative" in feature:
            documents.setdefault(number(feature, "negative"), len(documents))
    if len(documents) < 2:
        raise DataError("all anchors have the same positive, and there is no other document")
    relevant = tuple(tuple(sorted(set(places))) for places in belongs.values())
    return Embedded(tuple(texts), Retrieval(tuple(belongs), tuple(documents), relevant), recipe)
