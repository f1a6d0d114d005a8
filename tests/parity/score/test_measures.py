"""The metrics of tasks, on examples with known values."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from loradeploy.parity.score.measures import (
    MEASURED,
    MEASURES,
    class_counts,
    common_length,
    entity_counts,
    entity_spans,
    label_counts,
    macro_f1,
    micro_f1,
    number_pairs,
    pearson,
    resampled_interval,
    retrieval_counts,
    rmse,
    rouge_l,
    spearman,
)

B, INSIDE, PLACE, OUT = "B-PER", "I-PER", "I-LOC", "O"


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ([OUT, B, INSIDE, OUT], {("PER", 1, 2)}),
        ([B, B, INSIDE], {("PER", 0, 0), ("PER", 1, 2)}),
        ([B, PLACE, PLACE], {("PER", 0, 0), ("LOC", 1, 2)}),  # I- of another type begins an entity
        ([INSIDE, INSIDE, OUT, INSIDE], {("PER", 0, 1), ("PER", 3, 3)}),
        (["S-PER", "B-PER", "E-PER", "E-PER"], {("PER", 0, 0), ("PER", 1, 2), ("PER", 3, 3)}),
        (["person", "person", OUT, "place"], {("person", 0, 1), ("place", 3, 3)}),
        ([OUT, OUT], set()),
        ([], set()),
    ],
)
def test_entities_are_those_that_seqeval_finds(
    tags: list[str], spans: set[tuple[str, int, int]]
) -> None:
    assert entity_spans(tags) == spans


def test_the_f1_of_entities_is_that_of_seqevals_own_example() -> None:
    # From seqeval's README, where f1_score gives 0.50.
    labels = ["O", "B-MISC", "I-MISC", "B-PER", "I-PER"]
    truth = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    found = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    counts = []
    for right, given in zip(truth, found, strict=True):
        logits = np.eye(5)[[labels.index(tag) for tag in [*given, "O"]]]
        marks = [labels.index(tag) for tag in right]
        counts.append(entity_counts(logits, [*marks, -100], labels, -100))
    assert micro_f1(np.stack(counts)) == 0.5


def test_micro_and_per_label_f1() -> None:
    logits = np.array([[2.0, -1.0, 0.5], [-1.0, -2.0, 3.0], [0.0, -0.1, -1.0]])
    truth = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
    counts = np.stack([label_counts(*row) for row in zip(logits, truth, strict=True)])
    # By label: 2 of 2 correct; 1 missed; 1 correct, 1 false positive, 1 missed.
    assert micro_f1(counts) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert macro_f1(counts) == pytest.approx((1 + 0 + 0.5) / 3)
    assert micro_f1(np.zeros((2, 3, 3))) == macro_f1(np.zeros((2, 3, 3))) == 0.0


def test_f1_scores_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import f1_score

    draw = np.random.default_rng(0)
    truth = draw.integers(0, 4, 30)  # the fifth label never occurs
    logits = draw.normal(size=(30, 5))
    logits[:, 4] = -9
    counts = np.stack([class_counts(row, int(t)) for row, t in zip(logits, truth, strict=True)])
    expected = f1_score(truth, logits.argmax(axis=1), average="macro")
    assert macro_f1(counts) == pytest.approx(expected)
    several = draw.integers(0, 2, (30, 5))
    several[:, 4] = 0
    counts = np.stack([label_counts(row, own) for row, own in zip(logits, several, strict=True)])
    for measure, average in ((micro_f1, "micro"), (macro_f1, "macro")):
        given = {"average": average, "zero_division": np.nan}
        assert measure(counts) == pytest.approx(f1_score(several, logits >= 0, **given))
    for counted in (
        class_counts(np.array([np.nan, 0.0]), 0),
        label_counts(np.array([np.nan]), [1.0]),
    ):
        assert np.isnan(macro_f1(counted[None])) and np.isnan(micro_f1(counted[None]))


def test_errors_and_correlations_of_regression_values() -> None:
    truth = [1.0, 2.0, 3.0, 4.0, 5.0]
    values = [2.0, 1.0, 4.0, 3.0, 7.0]
    pairs = np.stack([number_pairs(np.array([v]), [t]) for v, t in zip(values, truth, strict=True)])
    assert rmse(pairs) == pytest.approx(math.sqrt((1 + 1 + 1 + 1 + 4) / 5))
    assert pearson(pairs) == pytest.approx(np.corrcoef(values, truth)[0, 1])
    assert spearman(pairs) == pytest.approx(0.8)  # 1 − 6 · Σd² / (n (n² − 1)), Σd² = 4
    ties = np.stack([np.array([[1.0, 1.0]]), np.array([[1.0, 2.0]]), np.array([[2.0, 3.0]])])
    assert spearman(ties) == pytest.approx(math.sqrt(3) / 2)
    assert pearson(np.ones((4, 1, 2))) == 0.0, "what is the same everywhere correlates with nothing"


@pytest.mark.parametrize("kind", MEASURED)
def test_every_kind_of_task_has_metrics(kind: str) -> None:
    assert all(name in MEASURES for name in MEASURED[kind])


def test_nan_values_are_counted_as_invalid() -> None:
    assert np.isnan(label_counts(np.array([np.nan, 1.0]), [1.0, 0.0])).all()
    assert np.isnan(entity_counts(np.array([[np.inf, 0.0]]), [0], ["O", "B-X"], -100)).all()


def test_the_interval_contains_the_difference_and_has_no_width_for_equal_sides() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(size=(60, 1))
    near = np.stack([truth + random.normal(size=truth.shape) * 0.1, truth], axis=2)
    far = np.stack([truth + random.normal(size=truth.shape) * 0.5, truth], axis=2)
    low, high = resampled_interval(rmse, near, far)
    assert low <= rmse(far) - rmse(near) <= high
    assert low > 0, "a worse model is seen"
    assert resampled_interval(rmse, near, near) == (0.0, 0.0)


def test_ranks_of_documents_are_those_of_sentence_transformers() -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    draw = np.random.default_rng(0)
    similar = draw.normal(size=(6, 30))
    relevant = [set(draw.choice(30, size=1 + n % 3, replace=False).tolist()) for n in range(6)]
    found = np.stack(
        [retrieval_counts(row, sorted(own)) for row, own in zip(similar, relevant, strict=True)]
    )
    evaluator = InformationRetrievalEvaluator(
        queries={str(n): "" for n in range(6)},
        corpus={str(n): "" for n in range(30)},
        relevant_docs={str(n): {str(d) for d in own} for n, own in enumerate(relevant)},
        mrr_at_k=[30],
        precision_recall_at_k=[1, 10],
    )
    hits = [[{"corpus_id": str(d), "score": float(row[d])} for d in range(30)] for row in similar]
    expected = evaluator.compute_metrics(hits)
    theirs = [expected["mrr@k"][30], expected["recall@k"][1], expected["recall@k"][10]]
    ours = [MEASURES[name].of(found) for name in MEASURED["retrieval"]]  # type: ignore[misc]
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert 0 < ours[1] < ours[2] < 1


def test_vectors_that_are_all_equal_retrieve_nothing() -> None:
    assert retrieval_counts(np.ones(20), [3]).tolist() == [1 / 20, 0, 0]
    assert np.isnan(retrieval_counts(np.array([np.nan, 1.0]), [0])).all()


@pytest.mark.parametrize(
    ("text", "target", "value"),
    [
        # Lin's own sentences (2004, section 3.1): 3 and 2 of 4 words in order.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        # Case and punctuation do not count: "police killed the" of 5 and 4 words.
        ("Police, killed; the gun-man.", "police killed the gunman", 2 * 3 / 9),
        ("a b a_c", "b a c a", 2 * 3 / 8),
        ("the cat", "the cat", 1),
        ("É été", "é ÉTÉ", 1),  # rouge-score drops these letters
        ("हिन्दी भाषा", "हिन्दी", 2 / 3),  # vowels are marks
        ("cat", "dog", 0),
        ("", "the cat", 0),
        ("...", "...", 0),  # no words on either side
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(
    text: str, target: str, value: float
) -> None:
    assert rouge_l(text, target) == pytest.approx(value, abs=1e-15)


def test_the_length_of_common_subsequences_is_that_of_the_recursion() -> None:
    @cache
    def slow(one: str, other: str) -> int:
        if not one or not other:
            return 0
        if one[-1] == other[-1]:
            return slow(one[:-1], other[:-1]) + 1
        return max(slow(one[:-1], other), slow(one, other[:-1]))

    generator = np.random.default_rng(0)
    for _ in range(200):
        one, other = (
            "".join(generator.choice(list("abcd"), n)) for n in generator.integers(0, 9, 2)
        )
        assert common_length(one, other) == slow(one, other), (one, other)
    long = ["x", "y"] * 100  # more words than a machine word has bits
    assert common_length(long, long[1:]) == 199
