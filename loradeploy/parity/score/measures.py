"""The figures of each task: what they are of the examples, and how the answers are counted.

Of a kind of task an answer is counted as

    several labels   true and false positives and false negatives of each label, [labels, 3]
    numbers          the number and the right one, for each of them, [numbers, 2]
    entities         true and false positives and false negatives, [1, 3]
    retrieval        the reciprocal rank of a query, and its recall at 1 and at 10, [3]
    similarity       the cosine of a pair and its score, [1, 2]

and a figure is a function of these over examples, [examples, …].
"""

from __future__ import annotations

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
    """A figure of a task. `limit`: the field of its limit.

    `of`: what it is of the counts; None where it has a formula and an interval of its own.
    """

    name: str
    limit: Literal["accuracy", "perplexity"]
    of: Callable[[Counts], float] | None = None

    @property
    def higher(self) -> bool:
        """Whether more of it is better."""
        return self.name not in LOWER_IS_BETTER


def micro_f1(counts: Counts) -> float:
    """2 tp / (2 tp + fp + fn) over all labels of [examples, labels, 3]; 0 where there are none."""
    return float(_f1(counts.sum(axis=(0, 1))))


def macro_f1(counts: Counts) -> float:
    """The mean of each label's F1, of [examples, labels, 3]."""
    return float(np.mean(_f1(counts.sum(axis=0))))


def rmse(pairs: Counts) -> float:
    """The root of the mean squared error, of [examples, numbers, 2]."""
    return float(np.sqrt(np.mean((pairs[..., 0] - pairs[..., 1]) ** 2)))


def pearson(pairs: Counts) -> float:
    """Pearson's correlation, of [examples, numbers, 2], the mean over numbers."""
    return float(np.mean([_correlation(*column.T) for column in pairs.swapaxes(0, 1)]))


def spearman(pairs: Counts) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing theirs."""
    ranked = [[_ranks(side) for side in column.T] for column in pairs.swapaxes(0, 1)]
    return float(np.mean([_correlation(*sides) for sides in ranked]))


def mean_of(column: int) -> Callable[[Counts], float]:
    """The mean over examples of a column of [examples, columns]."""
    return lambda counts: float(counts[:, column].mean())


def error_rate(counts: Counts) -> float:
    """The errors by the words of [examples, 2]."""
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
        Measure("wer", "perplexity", error_rate),
    )
}
# What an embedder is measured as, by its data.
RETRIEVAL: Final = "retrieval"
SIMILARITY: Final = "similarity"
# What an encoder-decoder is measured as, by its source.
TRANSLATION: Final = "translation"
TRANSCRIPTION: Final = "transcription"
_RECALLS: Final = (1, 10)

# By kind of task: the problem type of a sequence classifier, what an embedder is measured as, else
# the task.
MEASURED: Final[Mapping[str, tuple[str, ...]]] = {
    CAUSAL_LM: ("perplexity",),
    SINGLE_LABEL: ("accuracy",),
    MULTI_LABEL: ("micro_f1", "macro_f1"),
    REGRESSION: ("rmse", "pearson", "spearman"),
    TOKEN_CLASSIFICATION: ("entity_f1",),
    RETRIEVAL: ("mrr", "recall_at_1", "recall_at_10"),
    SIMILARITY: ("pearson", "spearman"),
    TRANSLATION: ("chrf",),
    TRANSCRIPTION: ("wer",),
}
# The kinds of the tasks that have several.
KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    IMAGE_CLASSIFICATION: (SINGLE_LABEL,),
    SEQUENCE_CLASSIFICATION: (SINGLE_LABEL, MULTI_LABEL, REGRESSION),
    FEATURE_EXTRACTION: (RETRIEVAL, SIMILARITY),
    SEQ2SEQ_LM: (TRANSLATION, TRANSCRIPTION),
}


def label_counts(logits: NDArray[Any], truth: Sequence[float]) -> Counts:
    """[labels, 3] of one text: a label holds from a probability of 0.5 on, a logit of 0."""
    if not np.isfinite(logits).all():
        return np.full((len(logits), 3), np.nan)
    found, right = logits >= 0, np.array(truth) > 0
    return np.stack([found & right, found & ~right, ~found & right], axis=1).astype(np.float64)


def number_pairs(values: NDArray[Any], truth: Sequence[float]) -> Counts:
    """[numbers, 2] of one text."""
    return np.stack([values.astype(np.float64), np.array(truth, np.float64)], axis=1)


def entity_counts(
    logits: NDArray[Any], truth: Sequence[int], labels: Sequence[str], ignored: int
) -> Counts:
    """[1, 3] of one text, of `logits` [tokens, labels] where `truth` [tokens] is not `ignored`."""
    at = np.flatnonzero(np.array(truth) != ignored)
    if not np.isfinite(logits[at]).all():
        return np.full((1, 3), np.nan)
    found = entity_spans([labels[number] for number in logits[at].argmax(axis=1)])
    right = entity_spans([labels[truth[int(index)]] for index in at])
    both = len(found & right)
    return np.array([[both, len(found) - both, len(right) - both]], np.float64)


def retrieval_counts(similarities: NDArray[Any], relevant: Sequence[int]) -> Counts:
    """[3] of a query, of its `similarities` [documents]; `relevant` are numbers of documents.

    A document as similar as a relevant one is ranked before it: vectors that are all alike find
    nothing.
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
    """The entities of a text's `tags` as (kind, first, last), as seqeval finds them by default.

    B- begins one, I- goes on with one of its kind and else begins one. E- ends one, S- is one. A
    tag without a prefix is a kind of its own.
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


def resampled_interval(
    measure: Callable[[Counts], float], expected: Counts, actual: Counts
) -> tuple[float, float]:
    """The 95 % interval of the measure's difference, actual − expected, by the paired bootstrap.

    The same examples are drawn again for both sides, always the same draws (Efron & Tibshirani
    1993, An Introduction to the Bootstrap, section 13.3).
    """
    draws = np.random.default_rng(0).integers(0, len(expected), (_RESAMPLES, len(expected)))
    found = [measure(actual[draw]) - measure(expected[draw]) for draw in draws]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _f1(counts: Counts) -> Counts:
    tp, fp, fn = np.moveaxis(counts, -1, 0)
    of = 2 * tp + fp + fn
    found: Counts = np.divide(2 * tp, of, out=np.zeros_like(tp), where=of > 0)
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
