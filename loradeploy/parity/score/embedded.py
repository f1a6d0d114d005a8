"""Held-out data of an embedder: its texts, and what their vectors are compared for.

Pairs of an anchor and a positive are scored as a retrieval: each distinct anchor is a query, and
all positives and negatives that were drawn are the documents. Pairs with a score are scored by the
cosine of their vectors.
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

# A text: its tokens, and how many of them are a prompt that is not pooled.
Text = tuple[tuple[int, ...], int]


@dataclass(frozen=True)
class Retrieval:
    """`queries` and `documents` are numbers of texts; `relevant`: of each query, places in them."""

    queries: tuple[int, ...]
    documents: tuple[int, ...]
    relevant: tuple[tuple[int, ...], ...]
    kind: str = RETRIEVAL

    def __len__(self) -> int:
        return len(self.queries)

    def counts(self, vectors: NDArray[Any]) -> Counts:
        """[queries, 3], of `vectors` [texts, size] at length 1: reciprocal rank, the recalls."""
        similar = vectors[list(self.queries)] @ vectors[list(self.documents)].T
        rows = zip(similar, self.relevant, strict=True)
        return np.stack([retrieval_counts(row, relevant) for row, relevant in rows])


@dataclass(frozen=True)
class Similarity:
    """`pairs` are numbers of texts; `scores`: how similar they are."""

    pairs: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]
    kind: str = SIMILARITY

    def __len__(self) -> int:
        return len(self.pairs)

    def counts(self, vectors: NDArray[Any]) -> Counts:
        """[pairs, 1, 2], of `vectors` [texts, size] at length 1: the cosine, and the score."""
        first, second = (vectors[list(side)] for side in zip(*self.pairs, strict=True))
        return np.stack([(first * second).sum(axis=1), np.array(self.scores)], axis=1)[:, None]


@dataclass(frozen=True, eq=False)
class Embedded:
    """Texts that become vectors by `recipe`, and what these are compared for."""

    texts: tuple[Text, ...]
    compared: Retrieval | Similarity
    recipe: SentenceRecipe

    def vector(self, values: NDArray[Any], number: int) -> Any:
        """The vector [size], at length 1, of what the graph gives for the text of this number.

        `values`: its tokens' states [tokens, hidden], or one vector [hidden].
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
    """The tokenized examples of `train.tasks.embedding.features`.

    Raises:
        DataError: there is one document alone, or one score.
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
