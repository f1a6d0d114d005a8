"""The metrics of each task.

The answer of a model to one example is reduced to an array of counts, by kind of task:

    one label, several labels
                     true positives, false positives, false negatives of each label, [labels, 3]
    numbers          the answer and the expected number, for each number, [numbers, 2]
    entities         true positives, false positives, false negatives, [1, 3]
    retrieval        reciprocal rank of a query, recall at 1, recall at 10, [3]
    similarity       cosine of a pair and its score, [1, 2]
    translation      chrF and ROUGE-L of a text, [2]
    transcription    word errors, and words of the target, [2]

A metric is a function of the counts of all examples, [examples, …].
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from loradeploy.adapter.heads import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    IMAGE_CLASSIFICATION,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from loradeploy.parity.report.results import LOWER_IS_BETTER

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Counts = NDArray[np.float64]

_RESAMPLES: Final = 999


@dataclass(frozen=True)
class Measure:
    """A metric of a task. `limit`: the field of `ScoreLimit` with its limit.

    `of`: computes it from the counts; None for accuracy and perplexity, which `scores` computes.
    """

    name: str
    limit: Literal["accuracy", "perplexity"]
    of: Callable[[Counts], float] | None = None

    @property
    def higher(self) -> bool:
        """Whether higher is better."""
        return self.name not in LOWER_IS_BETTER


def micro_f1(counts: Counts) -> float:
    """Return 2 tp / (2 tp + fp + fn) over all labels of [examples, labels, 3]; 0 without any."""
    return float(_f1(counts.sum(axis=(0, 1))))


def macro_f1(counts: Counts) -> float:
    """Return the mean F1 of the labels that occur, expected or predicted, of [examples, labels, 3].

    Equals scikit-learn's f1_score with average="macro" and, for several labels, zero_division=nan.
    """
    by_label = counts.sum(axis=0)
    occurring = by_label[by_label.sum(axis=1) != 0]  # NaN counts as occurring
    return float(np.mean(_f1(occurring))) if len(occurring) else 0.0


def rmse(pairs: Counts) -> float:
    """Return the root mean squared error, of [examples, numbers, 2]."""
    return float(np.sqrt(np.mean((pairs[..., 0] - pairs[..., 1]) ** 2)))


def pearson(pairs: Counts) -> float:
    """Return Pearson's correlation of [examples, numbers, 2], averaged over numbers."""
    return float(np.mean([_correlation(*column.T) for column in pairs.swapaxes(0, 1)]))


def spearman(pairs: Counts) -> float:
    """Return Spearman's correlation: Pearson's of the ranks, with tied values sharing a rank."""
    ranked = [[_ranks(side) for side in column.T] for column in pairs.swapaxes(0, 1)]
    return float(np.mean([_correlation(*sides) for sides in ranked]))


def mean_of(column: int) -> Callable[[Counts], float]:
    """Return the function that averages a column of [examples, columns]."""
    return lambda counts: float(counts[:, column].mean())


def error_rate(counts: Counts) -> float:
    """Return errors / words, over all examples of [examples, 2]."""
    errors, words = counts.sum(axis=0)
    return float(errors / words)


MEASURES: Final[Mapping[str, Measure]] = {
    measure.name: measure
    for measure in (
        Measure("perplexity", "perplexity"),
        Measure("accuracy", "accuracy"),
        Measure("micro_f1", "accuracy", micro_f1),
        Measure("macro_f1", "accuracy", macro_f1),
        Measure("entity_f1", "accuracy", micro_f1),
        Measure("rmse", "perplexity", rmse),
        Measure("pearson", "accuracy", pearson),
        Measure("spearman", "accuracy", spearman),
        Measure("mrr", "accuracy", mean_of(0)),
        Measure("recall_at_1", "accuracy", mean_of(1)),
        Measure("recall_at_10", "accuracy", mean_of(2)),
        Measure("chrf", "accuracy", mean_of(0)),
        Measure("rouge_l", "accuracy", mean_of(1)),
        Measure("wer", "perplexity", error_rate),
    )
}
# The kinds of task of an embedder, which depend on its data.
RETRIEVAL: Final = "retrieval"
SIMILARITY: Final = "similarity"
# The kinds of task of an encoder-decoder, which depend on its source.
TRANSLATION: Final = "translation"
TRANSCRIPTION: Final = "transcription"
_RECALLS: Final = (1, 10)

# The metrics by kind of task: a sequence classifier's problem type, one of the kinds above, or the
# task itself.
MEASURED: Final[Mapping[str, tuple[str, ...]]] = {
    CAUSAL_LM: ("perplexity",),
    SINGLE_LABEL: ("accuracy", "macro_f1"),
    MULTI_LABEL: ("micro_f1", "macro_f1"),
    REGRESSION: ("rmse", "pearson", "spearman"),
    TOKEN_CLASSIFICATION: ("entity_f1",),
    RETRIEVAL: ("mrr", "recall_at_1", "recall_at_10"),
    SIMILARITY: ("pearson", "spearman"),
    TRANSLATION: ("chrf", "rouge_l"),
    TRANSCRIPTION: ("wer",),
}
# The kinds of each task that is measured by kind.
KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    IMAGE_CLASSIFICATION: (SINGLE_LABEL,),
    SEQUENCE_CLASSIFICATION: (SINGLE_LABEL, MULTI_LABEL, REGRESSION),
    FEATURE_EXTRACTION: (RETRIEVAL, SIMILARITY),
    SEQ2SEQ_LM: (TRANSLATION, TRANSCRIPTION),
}


def class_counts(logits: NDArray[Any], truth: int) -> Counts:
    """Return [labels, 3] of one example; the label with the largest logit is predicted."""
    found, right = (np.arange(len(logits)) == label for label in (logits.argmax(), truth))
    return _outcomes(logits, found, right)


def label_counts(logits: NDArray[Any], truth: Sequence[float]) -> Counts:
    """Return [labels, 3] of one text; a label is predicted if its logit is at least 0."""
    return _outcomes(logits, logits >= 0, np.array(truth) > 0)


def _outcomes(logits: NDArray[Any], found: NDArray[Any], right: NDArray[Any]) -> Counts:
    if not np.isfinite(logits).all():
        return np.full((len(logits), 3), np.nan)
    return np.stack([found & right, found & ~right, ~found & right], axis=1).astype(np.float64)


def number_pairs(values: NDArray[Any], truth: Sequence[float]) -> Counts:
    """Return [numbers, 2] of one text."""
    return np.stack([values.astype(np.float64), np.array(truth, np.float64)], axis=1)


def entity_counts(
    logits: NDArray[Any], truth: Sequence[int], labels: Sequence[str], ignored: int
) -> Counts:
    """Return [1, 3] of one text; `logits` [tokens, labels] count where `truth` is not `ignored`."""
    at = np.flatnonzero(np.array(truth) != ignored)
    if not np.isfinite(logits[at]).all():
        return np.full((1, 3), np.nan)
    found = entity_spans([labels[number] for number in logits[at].argmax(axis=1)])
    right = entity_spans([labels[truth[int(index)]] for index in at])
    both = len(found & right)
    return np.array([[both, len(found) - both, len(right) - both]], np.float64)


def retrieval_counts(similarities: NDArray[Any], relevant: Sequence[int]) -> Counts:
    """Return [3] of a query with `similarities` [documents] and `relevant` indices of documents.

    A document as similar as a relevant one is ranked before it, so that equal vectors do not score.
    """
    if not np.isfinite(similarities).all():
        return np.full(1 + len(_RECALLS), np.nan)
    own = np.zeros(len(similarities), bool)
    own[list(relevant)] = True
    others = similarities[~own]
    best_first = np.sort(similarities[own])[::-1]
    ranks = 1 + np.arange(len(best_first)) + (others >= best_first[:, None]).sum(axis=1)
    return np.array([1 / ranks[0], *((ranks <= k).mean() for k in _RECALLS)], np.float64)


def entity_spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the entities in the `tags` of a text as (kind, first, last), like seqeval by default.

    B- begins an entity. I- continues one of its kind, otherwise begins one. E- ends an entity, and
    S- is a single-token entity. A tag without a prefix is treated as I- of that kind.
    """
    spans, kind, first, before = set(), "", 0, "O"
    for index, tag in enumerate([*tags, "O"]):
        mark, _, rest = tag.partition("-")
        if tag != "O" and (mark not in ("B", "I", "E", "S") or not rest):
            mark, rest = "I", tag
        begins = mark != "O" and (mark in ("B", "S") or before in ("O", "E", "S") or rest != kind)
        if before != "O" and (begins or mark == "O"):
            spans.add((kind, first, index - 1))
        if begins:
            first = index
        kind, before = rest, mark
    return spans


def rouge_l(text: str, target: str) -> float:
    """Return ROUGE-L, the F1 of the longest common subsequence of words (Lin 2004, section 3.1).

    Words are runs of letters, their marks and digits, in lower case, not stemmed. For texts in
    ASCII it equals rougeL of the package rouge-score; that one drops other letters.
    """
    found, right = _words(text), _words(target)
    common = common_length(found, right)
    return 2 * common / (len(found) + len(right)) if common else 0.0


def _words(text: str) -> list[str]:
    """Return the words of `text`. Marks such as the vowels of Devanagari are parts of words."""
    kinds = ((letter, unicodedata.category(letter)[0]) for letter in text.lower())
    return "".join(letter if kind in "LMN" else " " for letter, kind in kinds).split()


def common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, computed for all of `one` at once.

    Bit i of `open_` is 0 where the subsequence of one[:i + 1] is longer than that of one[:i]
    (Hyyrö 2004, Bit-parallel LCS-length computation revisited).
    """
    full = (1 << len(one)) - 1
    places: dict[str, int] = {}
    for index, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << index
    open_ = full
    for word in other:
        matched = open_ & places.get(word, 0)
        open_ = (open_ + matched | open_ - matched) & full
    return len(one) - open_.bit_count()


def resampled_interval(
    measure: Callable[[Counts], float], expected: Counts, actual: Counts
) -> tuple[float, float]:
    """Return the 95 % interval of the metric's difference, actual − expected, by paired bootstrap.

    The same examples are resampled for both sides, with a fixed seed (Efron & Tibshirani 1993, An
    Introduction to the Bootstrap, section 13.3).
    """
    draws = np.random.default_rng(0).integers(0, len(expected), (_RESAMPLES, len(expected)))
    found = [measure(actual[draw]) - measure(expected[draw]) for draw in draws]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _f1(counts: Counts) -> Counts:
    tp, fp, fn = np.moveaxis(counts, -1, 0)
    of = 2 * tp + fp + fn
    found: Counts = np.divide(2 * tp, of, out=np.zeros_like(tp), where=of != 0)  # NaN stays
    return found


def _correlation(x: Counts, y: Counts) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / size if size > 0 else 0.0


def _ranks(values: Counts) -> Counts:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Counts = (last - (counts - 1) / 2)[inverse]
    return ranks
