"""Task metrics on held-out data: how well a deployment performs the adapter's task.

The metrics (`measures`) are accuracy and F1 for classifiers, F1 for several labels and entities,
errors and correlations for numbers, ranks of documents for embedders, perplexity for causal
language models, and chrF, ROUGE-L or word error rate for generated texts. They are computed for the
float32 PyTorch model with the adapter and for every scored ONNX backend, on the same examples. For
a bundle of lower precision they are the most informative figures: rounding changes every logit, but
what matters is the answers.

A score is judged like a non-inferiority trial. It fails if a loss of more than the limit is
certain, that is, if the whole interval is beyond the limit. It also fails if such a loss cannot be
excluded although there are enough examples, that is, if the interval is no wider than the limit.
With too few examples nothing is proved; the score passes, with a message that says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from loradeploy.adapter.heads import MULTI_LABEL, REGRESSION
from loradeploy.adapter.tasks import CAUSAL_LM, TOKEN_CLASSIFICATION
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import UsageError, kind_and_line
from loradeploy.parity.backends.onnx_model import NotRunError
from loradeploy.parity.backends.table import Backend, open_backend
from loradeploy.parity.names import ONNX_MERGED, ONNX_SIDE_INPUTS
from loradeploy.parity.phases.batches import batch_size
from loradeploy.parity.phases.models import Model
from loradeploy.parity.report.results import Score
from loradeploy.parity.score.generated import of_session, of_torch
from loradeploy.parity.score.intervals import mean_interval, proportions_interval
from loradeploy.parity.score.measures import (
    MEASURES,
    class_counts,
    entity_counts,
    label_counts,
    number_pairs,
    resampled_interval,
)
from loradeploy.runtime.text.padding import pad as pad_rows

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest
    from loradeploy.parity.backends.onnx_model import OnnxModel
    from loradeploy.parity.context import AdapterUnderTest, CheckContext
    from loradeploy.parity.score.heldout import Example, HeldOut

# The scored backends: those with one adapter for all rows, each on a different graph.
SCORED: Final = (ONNX_SIDE_INPUTS, ONNX_MERGED)

_BLOCK: Final = 1 << 20  # number of logits whose normalizer is computed at a time
_WIDEST: Final = 1 << 17  # assumed vocabulary size, if the graph does not declare it


@dataclass(frozen=True)
class ScoreLimit:
    """By which share of the reference's value a score may be worse, and the reason."""

    accuracy: float
    perplexity: float
    reason: str


# MLPerf Inference requires 99.9 % or 99 % of float32's accuracy. The loss of perplexity by rounding
# depends on the model's size: for Llama 7B, llama.cpp reports +0.01 % at 8 bits and +3.7 % at 4;
# for SmolLM2-135M, +0.4 % and +24 % were measured here.
SCORE_LIMITS: Final[Mapping[str, ScoreLimit]] = {
    "fp32": ScoreLimit(0.001, 0.001, "logits within 2e-4 change a perplexity by 0.04 % at most"),
    "fp16": ScoreLimit(0.001, 0.005, "99.9 % of the accuracy; rounding that averages out"),
    "bf16": ScoreLimit(0.01, 0.01, "99 % of the accuracy; an eighth of float16's precision"),
    "int8": ScoreLimit(0.01, 0.01, "99 % of the accuracy; twice what 8 bits cost a small model"),
    "int4": ScoreLimit(
        0.01, 0.3, "99 % of the accuracy; what 16 levels cost a small model, and room"
    ),
}


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of a model to the examples.

    `sums`, `counts`, both [examples]: for a classifier, 1 for a correct answer or 0, and 1; for a
    language model, the negative log-likelihood of the labeled tokens, in nats, and their number.
    `tallies` [examples, …]: the counts of classifiers and other kinds of task (see `measures`).
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]
    tallies: NDArray[np.float64] | None = None

    def value(self, metric: str) -> float:
        """Return the metric over all examples."""
        formula = MEASURES[metric].of
        if formula is not None and self.tallies is not None:
            return formula(self.tallies)
        mean = float(self.sums.sum() / self.counts.sum())
        return mean if metric == "accuracy" else _exp(mean)


def check_scored(backends: Sequence[Backend], precision: str) -> None:
    """Raise UsageError unless one of `backends` is scored and `precision` has limits."""
    if not any(backend.name in SCORED for backend in backends):
        raise UsageError(f"nothing to evaluate: of the backends, {' and '.join(SCORED)} are scored")
    if precision not in SCORE_LIMITS:
        raise UsageError(f"parity knows no limits for a score in {precision}")


def score_reference(
    context: CheckContext, model: torch.nn.Module, held_out: Mapping[str | None, HeldOut]
) -> dict[str | None, Answers]:
    """Return the answers of PyTorch with loradeploy's LoRA, by adapter name.

    `model` has the original weights, which the adapters were trained on, not quantized ones.
    """
    from loradeploy.lora.inject import adapted
    from loradeploy.parity.reference.model import TorchModel

    tested: dict[str | None, AdapterUnderTest] = {one.name: one for one in context.adapters}
    found: dict[str | None, Answers] = {}
    for name, data in held_out.items():
        own = tested.get(name)
        with adapted(model, None if own is None else own.adapter):
            if data.generated is not None:
                # A merged bundle already contains the tokenizer files of its adapter.
                beside = None if own is None or context.merged else own.path
                texts = of_torch(model, data.generated, context.bundle, beside)
                found[name] = _of_counts(data.generated.counts(texts))
                continue
            found[name] = answers(TorchModel.of(context, model), data, name, context)
    return found


def score_backends(
    backends: Sequence[Backend],
    context: CheckContext,
    held_out: Mapping[str | None, HeldOut],
    expected: Mapping[str | None, Answers],
) -> tuple[Score, ...]:
    """Score every scored backend with every adapter against the reference's answers.

    Raises:
        LoraDeployError: an adapter or the bundle is invalid.
    """
    return tuple(
        score
        for backend in backends
        if expected and backend.name in SCORED and backend.missing(context) is None
        for score in _score_backend(backend, context, held_out, expected)
    )


def score_notes(context: CheckContext, held_out: Mapping[str | None, HeldOut]) -> list[str]:
    """Return notes on the held-out data, and on the variant if there are several."""
    where = f", on {context.variant}" if len(context.variants.each) > 1 else ""
    found = {
        f"scores: {data.taken} of {data.available} examples in {data.source}{where}"
        for data in held_out.values()
    }
    return sorted(found)


def answers(model: Model, data: HeldOut, adapter: str | None, context: CheckContext) -> Answers:
    """Run `model` on the examples in batches, the longest first, and return its answers."""
    if data.generated is not None:
        session = cast("OnnxModel", model).session
        assert session is not None
        return _of_counts(data.generated.counts(of_session(session, data.generated, adapter)))
    manifest, cases = context.manifest, context.cases
    causal = manifest.task == CAUSAL_LM
    examples = data.examples
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].tokens))
    size = batch_size(len(examples[order[0]].tokens), _width(manifest))
    sums = np.zeros(len(examples), np.float64)
    counts = np.ones(len(examples), np.int64)
    tallies: dict[int, NDArray[np.float64]] = {}
    vectors: dict[int, NDArray[Any]] = {}
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    if cases.alike:
        batches = [
            list(group)
            for batch in batches
            for _, group in groupby(batch, lambda index: len(examples[index].tokens))
        ]
    for batch in batches:
        tokens = [examples[index].tokens for index in batch]
        ids, mask = pad_rows(tokens, cases.pad, left=causal and cases.left)
        values, _ = model.forward(ids, mask, None, [adapter] * len(batch))
        for row, index in enumerate(batch):
            if data.embedded is not None:
                vectors[index] = data.embedded.vector(values[row], index)
            elif causal:
                real = values[row][mask[row].astype(bool)]  # [tokens, vocabulary]
                sums[index], counts[index] = _loss(real, examples[index])
            elif data.kind in _TALLIES:
                tallies[index] = _TALLIES[data.kind](values[row], examples[index], data.labels)
            else:
                own = values[row][: len(data.labels)]
                tallies[index] = class_counts(own, int(examples[index].labels[0]))
                sums[index] = tallies[index][:, 0].sum()  # its true positives
    if data.embedded is not None:
        compared = data.embedded.compared
        found = compared.counts(np.stack([vectors[index] for index in range(len(examples))]))
        return _of_counts(found)
    every = np.stack([tallies[index] for index in range(len(examples))]) if tallies else None
    return Answers(sums, counts, every)


def _of_counts(counts: NDArray[np.float64]) -> Answers:
    """Return answers that have `tallies` only, [examples, …]."""
    return Answers(np.zeros(len(counts)), np.ones(len(counts), np.int64), counts)


def _of_entities(
    values: NDArray[Any], example: Example, labels: Sequence[str]
) -> NDArray[np.float64]:
    from loradeploy.train.data.features import IGNORED

    own = values[: len(example.tokens), : len(labels)]
    return entity_counts(own, [int(label) for label in example.labels], labels, IGNORED)


# Functions that count an answer, from a row's logits, its example, and the names of the outputs.
_TALLIES: Final[
    Mapping[str, Callable[[NDArray[Any], Example, Sequence[str]], NDArray[np.float64]]]
] = {
    MULTI_LABEL: lambda values, example, labels: label_counts(
        values[: len(labels)], example.labels
    ),
    REGRESSION: lambda values, example, _: number_pairs(
        values[: len(example.labels)], example.labels
    ),
    TOKEN_CLASSIFICATION: _of_entities,
}


def judge_score(
    backend: Backend,
    adapter: str | None,
    metric: str,
    expected: Answers,
    actual: Answers,
    share: float,
) -> Score:
    """Judge the answers of both sides; `share` of the reference's value may be lost."""
    reference, value = expected.value(metric), actual.value(metric)
    low, high = difference_interval(metric, expected, actual)
    same = bool((actual.sums == expected.sums).all()) and _same(actual.tallies, expected.tallies)
    least, most = (-high, -low) if MEASURES[metric].higher else (low, high)
    limit = share * abs(reference)
    failed, text = _verdict(reference, value, least=least, most=most, limit=limit, same=same)
    return Score(
        backend=backend.name,
        title=backend.title,
        adapter=adapter,
        metric=metric,
        examples=len(expected.sums),
        reference=reference,
        value=value,
        difference=value - reference,
        low=low,
        high=high,
        limit=limit,
        passed=not failed,
        message=text,
    )


def difference_interval(metric: str, expected: Answers, actual: Answers) -> tuple[float, float]:
    """Return the 95 % confidence interval of actual − expected; NaN if a value is not finite.

    For accuracy it is Tango's interval, for counted answers (`measures`) the paired bootstrap's.
    For perplexity it is the reference's perplexity times exp(d) − 1, over the interval of d, the
    mean difference in negative log-likelihood (see `intervals`).
    """
    if not np.isfinite(actual.sums - expected.sums).all():
        return math.nan, math.nan
    formula = MEASURES[metric].of
    if formula is not None and expected.tallies is not None and actual.tallies is not None:
        if not np.isfinite(actual.tallies - expected.tallies).all():
            return math.nan, math.nan
        return resampled_interval(formula, expected.tallies, actual.tallies)
    if metric == "accuracy":
        gained = int((actual.sums > expected.sums).sum())
        lost = int((actual.sums < expected.sums).sum())
        return proportions_interval(gained, lost, len(expected.sums))
    low, high = mean_interval(actual.sums - expected.sums, expected.counts)
    reference = expected.value(metric)
    return reference * (_exp(low) - 1), reference * (_exp(high) - 1)


def _same(one: NDArray[Any] | None, other: NDArray[Any] | None) -> bool:
    return one is other if one is None or other is None else bool((one == other).all())


def _verdict(
    reference: float, value: float, *, least: float, most: float, limit: float, same: bool
) -> tuple[bool, str | None]:
    """Return whether a score fails, and its message; `least`, `most`: the interval of the loss."""
    if not math.isfinite(value - reference) or math.isnan(most - least):
        side = "it" if math.isfinite(reference) else "PyTorch"
        return True, f"is not a number: {side} gives NaN or infinite values"
    text = f"is {value:.4g} (PyTorch {reference:.4g})"
    lost = f"a loss of {least:.2g} to {most:.2g}, where at most {limit:.2g} is allowed"
    if least > limit:
        return True, f"{text}, certainly worse: {lost}"
    if most > limit >= most - least:
        return True, f"{text}, and may be worse: {lost}"
    if most > limit and not same:
        return False, f"{text}: too few examples to tell whether more than {limit:.2g} is lost"
    return False, None


def _score_backend(
    backend: Backend,
    context: CheckContext,
    held_out: Mapping[str | None, HeldOut],
    expected: Mapping[str | None, Answers],
) -> Iterator[Score]:
    share = SCORE_LIMITS[context.manifest.precision]
    opened = open_backend(backend, context, None)
    # A backend that cannot be opened is already reported in the results.
    with contextlib.suppress(NotRunError):
        for adapter, model in opened:
            if adapter not in expected:
                continue
            right = expected[adapter]
            try:
                found, problem = answers(model, held_out[adapter], adapter, context), None
            except Exception as raised:  # any error that a backend raises is its failure
                unknown = None if right.tallies is None else np.full_like(right.tallies, np.nan)
                found = Answers(np.full_like(right.sums, np.nan), right.counts, unknown)
                problem = f"could not be computed: {kind_and_line(raised)}"
            for metric in held_out[adapter].metrics:
                limit = getattr(share, MEASURES[metric].limit)
                score = judge_score(backend, adapter, metric, right, found, limit)
                yield score if problem is None else dataclasses.replace(score, message=problem)


def _loss(logits: NDArray[Any], example: Example) -> tuple[float, int]:
    """Return the negative log-likelihood of the labeled tokens, and their number.

    `logits` [tokens, vocabulary]; those at a position predict the next token.
    """
    from loradeploy.train.data.features import IGNORED

    labels = np.array(example.labels)
    at = np.flatnonzero(labels != IGNORED)
    total, step = 0.0, max(1, _BLOCK // logits.shape[1])
    for start in range(0, len(at), step):
        block = at[start : start + step]
        rows = logits[block - 1].astype(np.float64)
        peak = rows.max(axis=1)
        normalizer = peak + np.log(np.exp(rows - peak[:, None]).sum(axis=1))
        total += float((normalizer - rows[np.arange(len(block)), labels[block]]).sum())
    return total, len(at)


def _width(manifest: Manifest) -> int:
    """Return the number of output values for each token."""
    widths = [spec.shape[-1] for spec in manifest.outputs if spec.name == output_of(manifest)]
    return widths[0] if widths and isinstance(widths[0], int) else _WIDEST


def _exp(value: float) -> float:
    """Return e to the power of `value`, infinity on overflow."""
    return math.inf if value > 709 else math.exp(value)
