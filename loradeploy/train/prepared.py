"""Tokenized training and evaluation examples of a run."""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from loradeploy.errors import DataError, UsageError
from loradeploy.train.data.sources import Source, is_dataset
from loradeploy.train.tasks.table import Task

if TYPE_CHECKING:
    from loradeploy.train.config import TrainConfig
    from loradeploy.train.model import Checkpoint

# If the run has no evaluation data, the loss before and after training is measured on the first
# training examples: at most so many, and so many tokens. Long examples would take as long as
# several steps.
_EVALUATED: Final = 32
_EVALUATED_TOKENS: Final = 4096


@dataclass(frozen=True)
class Prepared:
    """Training and evaluation examples as token ids, and the label names of a classifier.

    `truncated` counts the examples, of both, that were longer than `max_length`. `evaluated_on`:
    "validation", or "training" if `evaluation` is the beginning of `training`.
    """

    training: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    evaluated_on: str
    truncated: int
    labels: tuple[str, ...] | None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the examples and labels."""
        read = json.dumps([self.training, self.evaluation, self.labels]).encode()
        return hashlib.sha256(read).hexdigest()


def prepare(
    data: str | os.PathLike[str], task: Task, opened: Checkpoint, config: TrainConfig
) -> Prepared:
    """Read and tokenize `data`, shuffle it, and split off the evaluation examples.

    Raises:
        DataError: the data cannot be used, one side of the split is empty, or the evaluation data
            has a label that the training data lacks.
        UsageError: a setting needs evaluation data, and none is configured.
    """
    source = Source(data, config.split, config.column_names)
    examples = task.read(source)
    labels = task.labels(examples) or None if task.labels is not None else None
    # With multi-label data, one label is enough if some examples do not have it.
    if labels is not None and len(labels) == 1 and all(example.labels for example in examples):
        raise DataError(f"{source}: all examples have the label {labels[0]!r}; two are needed")
    encoded = opened.encode(task, examples, labels or (), config.max_length)
    features, truncated = encoded.features, encoded.truncated
    random.Random(config.seed).shuffle(features)
    kept = round(len(features) * config.validation_split)
    if config.validation_split and not 0 < kept < len(features):
        raise DataError(
            f"{data} has {len(features)} examples: with `validation_split`"
            f" {config.validation_split:g} none is left {'to train' if kept else 'to evaluate'} on"
        )
    evaluation, features = features[:kept], features[kept:]
    if config.validation:
        read = task.read(_validation(source, config))
        others = opened.encode(task, read, labels or (), config.max_length)
        evaluation, truncated = others.features, truncated + others.truncated
    if (config.keep_best or config.early_stopping) and not evaluation:
        setting = "keep_best" if config.keep_best else "early_stopping"
        raise UsageError(
            f"`{setting}` needs examples that are not trained on: set `validation` or"
            " `validation_split`"
        )
    return Prepared(
        training=features,
        evaluation=evaluation or _first(features),
        evaluated_on="validation" if evaluation else "training",
        truncated=truncated,
        labels=labels,
    )


def _first(features: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The training examples to measure the loss on; at least one."""
    totals = accumulate(len(feature["input_ids"]) for feature in features[:_EVALUATED])
    return features[: max(1, sum(total <= _EVALUATED_TOKENS for total in totals))]


def _validation(source: Source, config: TrainConfig) -> Source:
    """Another split of the same dataset, or other data."""
    other = Source(config.validation, config.split, source.columns)
    if is_dataset(source) and not other.path.exists() and "/" not in config.validation:
        return Source(source.location, config.validation, source.columns)
    return other
