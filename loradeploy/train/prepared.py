"""The examples of a run as its model reads them, to train on and to be judged by."""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from loradeploy.errors import DataError, UsageError
from loradeploy.train.data import label_names
from loradeploy.train.sources import Source, is_dataset
from loradeploy.train.tasks import Task

if TYPE_CHECKING:
    from loradeploy.train.config import TrainConfig
    from loradeploy.train.model import Checkpoint

# Training examples that tell the loss before and after where there is nothing else to evaluate on.
_EVALUATED: Final = 32


@dataclass(frozen=True)
class Prepared:
    """What a run trains on and is judged by: token ids, and the label names of a classifier.

    `truncated` examples of both lost their end.
    """

    training: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    evaluated_on: str
    truncated: int
    labels: tuple[str, ...] | None

    @cached_property
    def digest(self) -> str:
        """The identity of all of it."""
        read = json.dumps([self.training, self.evaluation, self.labels]).encode()
        return hashlib.sha256(read).hexdigest()


def prepare(
    place: str | os.PathLike[str], task: Task, opened: Checkpoint, config: TrainConfig
) -> Prepared:
    """The examples in `place` as the model reads them, shuffled, and those to be judged by.

    Raises:
        DataError: the data cannot be used, leaves nothing on one side of the split, or has a label
            to evaluate on that is not trained on.
        UsageError: a setting that needs examples to evaluate on, and there are none.
    """
    source = Source(place, config.split, config.column_names)
    examples = task.read(source)
    labels = label_names(examples) if task.outputs is not None and task.judged else None
    if labels is not None and len(labels) == 1:
        raise DataError(f"{source}: all examples have the label {labels[0]!r}; two are needed")
    encoded = task.encode(examples, labels or (), opened.tokenizer, config.max_length)
    features, truncated = encoded.features, encoded.truncated
    random.Random(config.seed).shuffle(features)
    held = round(len(features) * config.validation_split)
    if config.validation_split and not 0 < held < len(features):
        raise DataError(
            f"{place}: of {len(features)} examples a validation_split of"
            f" {config.validation_split:g} leaves none on one side"
        )
    evaluation, features = features[:held], features[held:]
    if config.validation:
        read = task.read(_validation(source, config))
        others = task.encode(read, labels or (), opened.tokenizer, config.max_length)
        evaluation, truncated = others.features, truncated + others.truncated
    if (config.keep_best or config.early_stopping) and not evaluation:
        wanted = "keep_best" if config.keep_best else "early_stopping"
        raise UsageError(
            f"{wanted} needs examples that are not trained on: give validation or validation_split"
        )
    return Prepared(
        training=features,
        evaluation=evaluation or features[:_EVALUATED],
        evaluated_on="validation" if evaluation else "training",
        truncated=truncated,
        labels=labels,
    )


def _validation(source: Source, config: TrainConfig) -> Source:
    """Another split of the same dataset, or other data."""
    other = Source(config.validation, config.split, source.columns)
    if is_dataset(source) and not other.path.exists() and "/" not in config.validation:
        return Source(source.place, config.validation, source.columns)
    return other
