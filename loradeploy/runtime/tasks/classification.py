"""Labels from a classifier bundle, each text with its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.tasks import SEQUENCE_CLASSIFICATION
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import BundleError, UsageError
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import Adapters
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.encoder import encoded_batches
from loradeploy.runtime.texts import TextSide

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Kinds of classifier whose outputs are no probabilities of one label each.
OTHER_PROBLEMS: Final = ("multi_label_classification", "regression")


@dataclass(frozen=True)
class Classification:
    """The likeliest label of a text, its probability, and all probabilities by label."""

    label: str
    score: float
    scores: dict[str, float]
    adapter: AdapterSpec | None


class TextClassifier:
    """Classifies texts with a session on a sequence classification bundle.

    Raises:
        UsageError: the bundle is no classifier that gives each text one label.
        BundleError: the bundle holds no tokenizer.
    """

    def __init__(self, session: AdapterSession) -> None:
        if session.manifest.task != SEQUENCE_CLASSIFICATION:
            raise UsageError(f"{session.path} is a {session.manifest.task} bundle, no classifier")
        config = model_config(session.path)
        if config.get("problem_type") in OTHER_PROBLEMS:
            raise UsageError(
                f"{session.path} is for {config['problem_type']}, which gives no label: read its"
                " logits with AdapterSession.run"
            )
        self.session = session
        self.tokenizer = session.texts.base.tokenizer
        self._labels = label_names(config)

    def __call__(
        self, texts: str | Sequence[str], adapters: Adapters = None, *, batch_size: int = 32
    ) -> list[Classification]:
        """The label of each text. `adapters` is as in `AdapterSession.run`.

        Texts longer than the model's positions are cut at their end. Labels are named as the
        adapter was trained, else as in the bundle's config.json, else LABEL_0 and so on.

        Raises:
            UsageError: no texts, or not one adapter for each.
            UnknownAdapterError: an adapter that was never loaded.
        """
        results = []
        output = output_of(self.session.manifest)
        for held, rows, feeds, _ in encoded_batches(
            self.session, texts, adapters, batch_size, _encode
        ):
            (logits,) = held.run([output], feeds)  # [batch, labels]
            for row, (values, (name, _)) in enumerate(zip(logits, rows, strict=True)):
                own = held.labels(row)
                # An adapter may tell fewer labels apart than the graph has outputs.
                scores = _softmax(values[: len(own)] if own else values)
                results.append(_classification(scores, own or self._labels, name))
        return results


def _encode(text: str, side: TextSide) -> list[int]:
    return side.tokenizer.encode(text, max_length=side.tokenizer.max_length)


def _classification(
    scores: NDArray[np.float64], labels: Sequence[str], adapter: AdapterSpec | None
) -> Classification:
    if len(labels) != len(scores):
        labels = [f"LABEL_{number}" for number in range(len(scores))]
    best = int(scores.argmax())
    by_label = dict(zip(labels, map(float, scores), strict=True))
    return Classification(labels[best], float(scores[best]), by_label, adapter)


def _softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Over the last axis, in float64."""
    values = logits.astype(np.float64)
    weights = np.exp(values - values.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return result


def label_names(config: dict[str, Any]) -> list[str]:
    """The names of a classifier's outputs in a config.json; none where it tells none.

    Raises:
        BundleError: its id2label is broken.
    """
    names = config.get("id2label")
    if not isinstance(names, dict):
        return []
    try:
        return [str(names[key]) for key in sorted(names, key=int)]
    except ValueError:
        raise BundleError("config.json: the keys of id2label are not numbers") from None
