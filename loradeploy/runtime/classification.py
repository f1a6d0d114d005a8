"""Labels from a classifier bundle, each text with its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.bundle.names import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    SEQUENCE_CLASSIFICATION,
    TOKEN_TYPE_IDS,
)
from loradeploy.errors import BundleError, UsageError
from loradeploy.files import read_json
from loradeploy.runtime.session import Adapters, AdapterSession
from loradeploy.runtime.tokenizer import Tokenizer, pad

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Classification:
    """The likeliest label of a text, its probability, and all probabilities by label."""

    label: str
    score: float
    scores: dict[str, float]
    adapter: str | None


class TextClassifier:
    """Classifies texts with a session on a sequence classification bundle.

    Raises:
        UsageError: the bundle is no classifier.
        BundleError: the bundle holds no tokenizer.
    """

    def __init__(self, session: AdapterSession) -> None:
        if session.manifest.task != SEQUENCE_CLASSIFICATION:
            raise UsageError(f"{session.path} is a {session.manifest.task} bundle, no classifier")
        self.session = session
        self.tokenizer = Tokenizer(session.path)
        self._inputs = {spec.name for spec in session.manifest.inputs}
        self._labels = _config_labels(session)

    def __call__(self, texts: Sequence[str], adapters: Adapters = None) -> list[Classification]:
        """The label of each text. `adapters` is as in `AdapterSession.run`.

        Texts longer than the model's positions are cut at their end. Labels are named as the
        adapter was trained, else as in the bundle's config.json.

        Raises:
            UsageError: no texts, or a bare string instead of a list.
        """
        if isinstance(texts, str) or not texts:
            raise UsageError("give a list of one text or more")
        sequences = [self.tokenizer.encode(text)[: self.tokenizer.max_length] for text in texts]
        ids, mask = pad(sequences, self.tokenizer.pad_id, left=False)
        feeds: dict[str, Any] = {INPUT_IDS: ids, ATTENTION_MASK: mask}
        if TOKEN_TYPE_IDS in self._inputs:
            feeds[TOKEN_TYPE_IDS] = np.zeros_like(ids)
        (logits,) = self.session.run([LOGITS], feeds, adapters)
        names = (
            [adapters] * len(texts) if adapters is None or isinstance(adapters, str) else adapters
        )
        return [self._classification(row, name) for row, name in zip(logits, names, strict=True)]

    def _classification(self, logits: NDArray[Any], adapter: str | None) -> Classification:
        labels = self.session.labels(adapter) or self._labels
        if len(labels) != len(logits):
            labels = tuple(f"LABEL_{number}" for number in range(len(logits)))
        weights = np.exp(logits.astype(np.float64) - logits.max())
        scores = weights / weights.sum()
        best = int(scores.argmax())
        by_label = {label: float(score) for label, score in zip(labels, scores, strict=True)}
        return Classification(labels[best], float(scores[best]), by_label, adapter)


def _config_labels(session: AdapterSession) -> tuple[str, ...]:
    file = session.path / "config.json"
    names = read_json(file, error=BundleError).get("id2label") if file.is_file() else None
    if not isinstance(names, dict):
        return ()
    try:
        return tuple(str(names[key]) for key in sorted(names, key=int))
    except ValueError:
        raise BundleError(f"{file}: the keys of id2label are not numbers") from None
