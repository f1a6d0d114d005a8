"""Preview of a training run: the data as the model reads it, and the number of steps."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.tasks import IMAGE_CLASSIFICATION, SEQ2SEQ_LM
from loradeploy.lora.base.checkpoint import find_checkpoint
from loradeploy.lora.base.formats import BITSANDBYTES
from loradeploy.lora.quiet import quiet
from loradeploy.train.config import TrainConfig
from loradeploy.train.data.features import IGNORED
from loradeploy.train.loop.trainer import steps_of
from loradeploy.train.model import open_checkpoint
from loradeploy.train.prepared import prepare
from loradeploy.train.tasks.table import task_of
from loradeploy.train.tasks.targets import AUDIO

_SHOWN: Final = 3


@dataclass(frozen=True)
class ShownExample:
    """An example as tokens. `pieces`: pairs of a text and whether it is in the loss.

    Special tokens are shown by name. `learned`: number of tokens in the loss. `label`: the label of
    a classifier's example.
    """

    tokens: int
    learned: int
    pieces: tuple[tuple[str, bool], ...]
    label: str | None = None


@dataclass(frozen=True)
class Preview:
    """The figures of a training run.

    `tokens`: of all `examples`, of which `learned` are in the loss. `longest`: tokens of the
    longest example. `truncated`: number of truncated examples. `evaluated`: number of evaluation
    examples.
    """

    examples: int
    evaluated: int
    tokens: int
    learned: int
    longest: int
    truncated: int
    steps: int
    labels: tuple[str, ...] | None
    shown: tuple[ShownExample, ...]


def preview(
    model: str | os.PathLike[str], data: str | os.PathLike[str], config: TrainConfig
) -> Preview:
    """Read the data as `train` would, and count the steps; no weights are loaded.

    Raises:
        ModelError, DataError, UsageError: as `train`.
    """
    with quiet():
        directory = find_checkpoint(model, quantized=[BITSANDBYTES])
        opened = open_checkpoint(directory, texts=config.task != IMAGE_CLASSIFICATION)
        opened.check_exportable(config.task)
        begun = Path(config.init_adapter) if config.init_adapter else None
        task = task_of(config, opened.directory, begun)
        config = opened.within(config)
        prepared = prepare(data, task, opened, config)
    training = prepared.training
    lengths = [len(feature["input_ids"]) for feature in training]
    return Preview(
        examples=len(training),
        evaluated=len(prepared.evaluation) if prepared.evaluated_on == "validation" else 0,
        tokens=sum(lengths),
        learned=sum(_learned(feature) for feature in training),
        longest=max(lengths),
        truncated=prepared.truncated,
        steps=steps_of(config, len(training)),
        labels=prepared.labels,
        shown=tuple(
            _shown(feature, opened.tokenizer, prepared.labels, apart=task.name == SEQ2SEQ_LM)
            for feature in training[:_SHOWN]
        ),
    )


def _learned(feature: dict[str, Any]) -> int:
    labels = feature["labels"]
    return sum(label != IGNORED for label in labels) if isinstance(labels, list) else 1


def _shown(
    feature: dict[str, Any], tokenizer: Any, labels: tuple[str, ...] | None, *, apart: bool
) -> ShownExample:
    """`apart`: whether the labels are tokens of another text than the inputs."""
    ids, marks = feature["input_ids"], feature["labels"]
    if apart:
        source = feature.get(AUDIO) or tokenizer.decode(ids)
        pieces = ((f"{source} → ", False), (tokenizer.decode(marks), True))
        return ShownExample(tokens=len(ids), learned=len(marks), pieces=pieces)
    by_token = isinstance(marks, list) and len(marks) == len(ids)
    learned = [mark != IGNORED for mark in marks] if by_token else [False] * len(ids)
    shown = []
    for learning, group in groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False)
        shown.append((text, learning))
    return ShownExample(
        tokens=len(ids),
        learned=_learned(feature),
        pieces=tuple(shown),
        label=labels[marks] if labels is not None and isinstance(marks, int) else None,
    )
