"""Classify texts with a classifier bundle, each text with its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.heads import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    Head,
    config_labels,
    placeholders,
)
from loradeploy.adapter.tasks import SEQUENCE_CLASSIFICATION
from loradeploy.bundle.fitting.labels import output_count
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import CONFIG_NAME
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import BundleError, UsageError, shown
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import Adapters, check_probability
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.encoder import (
    check_answer,
    encode_texts_or_pairs,
    encoded_batches,
    given_texts_or_pairs,
)
from loradeploy.runtime.tasks.session_argument import check_session, check_task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest

# Minimum probability of a label of a multi-label classifier.
THRESHOLD: Final = 0.5


@dataclass(frozen=True)
class Classification:
    """The classification of a text or an image.

    `label`: the most likely label, and `score` its probability. For a regression, the name of the
    output with the largest number, and that number.
    `scores`: by label, all probabilities, or all numbers of a regression.
    `labels`: the predicted labels, the most likely first: one, or for a multi-label classifier all
    whose probability reaches the threshold; none for a regression.
    `problem_type`: "single_label_classification", "multi_label_classification" or "regression".
    """

    label: str
    score: float
    scores: dict[str, float]
    adapter: AdapterSpec | None
    labels: tuple[str, ...]
    problem_type: str


class TextClassifier:
    """Classifies texts with a session on a sequence classification bundle.

    Raises:
        UsageError: the bundle is not a text classifier.
        BundleError: the bundle has no tokenizer, or does not say what its outputs are.
    """

    def __init__(self, session: AdapterSession) -> None:
        check_session(session, type(self).__name__)
        check_task(session, SEQUENCE_CLASSIFICATION, ", no classifier")
        self.session = session
        self.tokenizer = session.texts.base.tokenizer
        self._head = base_head(session)

    def __call__(
        self,
        texts: str | Sequence[str | tuple[str, str]],
        adapters: Adapters = None,
        *,
        threshold: float | None = None,
        batch_size: int = 32,
    ) -> list[Classification]:
        """Classify each text or pair of texts. `adapters` is as in `AdapterSession.run`.

        The output of a row depends on its adapter's problem type: probabilities that add up to 1
        for single-label classifiers (softmax), one per label for multi-label classifiers (sigmoid),
        and raw numbers for regressions. Texts longer than the model's maximum are truncated at
        their end; of a pair (a tuple or list of two texts), the longer text is truncated first.
        Label names are the adapter's, otherwise those of the bundle's config.json, otherwise
        LABEL_0 and so on.

        `threshold`: the minimum probability of a label, for multi-label classifiers (0.5).

        Raises:
            UsageError: no texts, a text without tokens, not one adapter for each, a threshold for
                no multi-label classifier, an adapter whose file declares no problem type, or a text
                without an adapter if the base has no trained head.
            UnknownAdapterError: an adapter that was never loaded.
            RunError: the graph gave logits that are not finite numbers.
        """
        if threshold is not None:
            check_probability("threshold", threshold)
        results, problems = [], set[str]()
        output = output_of(self.session.manifest)
        for batch in encoded_batches(
            self.session,
            given_texts_or_pairs(texts),
            adapters,
            batch_size,
            encode_texts_or_pairs(self.session),
        ):
            (logits,) = batch.held.run([output], batch.feeds)  # [batch, labels]
            for row, (values, one) in enumerate(zip(logits, batch.rows, strict=True)):
                head = head_of_row(batch.held.head(row), self._head, one.adapter)
                problems.add(str(head.problem_type))
                check_activation(self.session.manifest, head, one.adapter)
                least = THRESHOLD if threshold is None else threshold
                own, labels = named_outputs(values, head)
                check_answer(own, one)
                results.append(classified(own, labels, head, one.adapter, least))
        if threshold is not None and MULTI_LABEL not in problems:
            raise UsageError(
                f"`threshold` is for {MULTI_LABEL}, and these are {', '.join(sorted(problems))}"
            )
        return results


def ends_in_sigmoid(manifest: Manifest) -> bool:
    """Whether the main output is that of a Sigmoid, of a regression in an ONNX graph."""
    return manifest.probabilities == output_of(manifest)


def check_activation(manifest: Manifest, head: Head, adapter: object) -> None:
    """Raise UsageError if the graph applies a Sigmoid to outputs that are not a regression's."""
    if ends_in_sigmoid(manifest) and head.problem_type != REGRESSION:
        raise UsageError(
            f"the adapter {shown(adapter)} is for {head.problem_type}, and the graph ends in the"
            " Sigmoid of a regression: export the graph without it"
        )


def base_head(session: AdapterSession) -> Head:
    """The head of a classifier's base, or of its merged adapter.

    Raises:
        BundleError: its config.json is broken, or the bundle is too old to declare a problem type.
    """
    manifest, merged = session.manifest, session.manifest.merged_adapter
    config = model_config(session.path)
    count = output_count(manifest, config)
    labels = config_labels(config, CONFIG_NAME, error=BundleError, outputs=count)
    if manifest.task == SEQUENCE_CLASSIFICATION and manifest.problem_type is None:
        raise BundleError(
            f"{session.path} has no problem_type, because it was exported by an older version:"
            " export again"
        )
    if merged is not None and merged.labels is not None:
        return Head(merged.labels, manifest.problem_type, len(merged.labels))
    trained = not any(parameter.lacking for parameter in manifest.saved)
    return Head(labels, manifest.problem_type, trained=trained)


def head_of_row(own: Head | None, base: Head, adapter: AdapterSpec | None) -> Head:
    """The head of a row: its adapter's, otherwise the base's.

    Raises:
        UsageError: its adapter was loaded from a file that does not declare one, or it has no
            adapter and the base's head was never trained.
    """
    if own is None:
        if not base.trained:
            raise UsageError(
                "the base has no trained head, so its scores mean nothing: give an adapter for each"
                " row"
            )
        return base
    if not own.declared:
        raise UsageError(
            f"the adapter {shown(adapter)} was loaded from a file that does not declare labels and"
            " problem type: load its PEFT directory, where a config.json may have problem_type and"
            " id2label"
        )
    return own if own.labels else Head(base.labels, own.problem_type)


def named_outputs(values: NDArray[Any], head: Head) -> tuple[NDArray[Any], Sequence[str]]:
    """A row's outputs [..., labels] and their names.

    An adapter may have fewer labels than the graph has outputs.
    """
    own = values[..., : head.outputs]
    labels = head.labels or ()
    return own, labels if len(labels) == own.shape[-1] else placeholders(own.shape[-1])


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Softmax over the last axis, in float64."""
    values = logits.astype(np.float64)
    weights = np.exp(values - values.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return result


def _sigmoid(logits: NDArray[Any]) -> NDArray[np.float64]:
    values = logits.astype(np.float64)
    small = np.exp(-np.abs(values))  # does not overflow
    result: NDArray[np.float64] = np.where(values < 0, small, 1.0) / (1.0 + small)
    return result


# From logits to scores, by problem type.
SCORES: Final[Mapping[str, Callable[[NDArray[Any]], NDArray[np.float64]]]] = {
    SINGLE_LABEL: softmax,
    MULTI_LABEL: _sigmoid,
    REGRESSION: lambda values: values.astype(np.float64),
}


def classified(
    logits: NDArray[Any],
    labels: Sequence[str],
    head: Head,
    adapter: AdapterSpec | None,
    threshold: float = THRESHOLD,
) -> Classification:
    """The classification of one input by its `logits` [labels] and the head's problem type."""
    problem = str(head.problem_type)
    scores = SCORES[problem](logits)
    best = int(scores.argmax())
    having = {
        SINGLE_LABEL: [best],
        MULTI_LABEL: [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] >= threshold],
        REGRESSION: [],
    }
    return Classification(
        label=labels[best],
        score=float(scores[best]),
        scores=dict(zip(labels, map(float, scores), strict=True)),
        adapter=adapter,
        labels=tuple(labels[number] for number in having[problem]),
        problem_type=problem,
    )
