"""The tasks that adapters are trained for: one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from loradeploy.adapter.heads import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TRAINED_PROBLEMS
from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    IMAGE_CLASSIFICATION,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    TASK_TABLE,
    TOKEN_CLASSIFICATION,
)
from loradeploy.train.config import SCORED_LOSSES, TrainConfig
from loradeploy.train.data import examples
from loradeploy.train.data.features import (
    Collator,
    Encoded,
    conversation_features,
    text_features,
    word_features,
)
from loradeploy.train.data.sources import Source
from loradeploy.train.tasks.embedding.data import read_scored_pairs, read_text_pairs
from loradeploy.train.tasks.embedding.features import RowsCollator, embedder_features
from loradeploy.train.tasks.embedding.losses import embedding_loss
from loradeploy.train.tasks.embedding.vectors import Vectors, vectors_of
from loradeploy.train.tasks.images import ImageSettings, image_loss, read_labeled_images
from loradeploy.train.tasks.losses import (
    LossFunction,
    causal_lm_loss,
    classification_loss,
    multi_label_loss,
    regression_loss,
    seq2seq_loss,
)
from loradeploy.train.tasks.targets import (
    AudioSettings,
    TargetCollator,
    takes_audio,
    translation_features,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[Sequence[Any], Sequence[str], "PreTrainedTokenizerBase", int], Encoded]
Collate = Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Task:
    """The parts of training that depend on the task.

    `name`: its row in `adapter.tasks`. `read`: reads the examples. `encode`: returns their token
    ids and labels, given the label names. `collate`: returns a collator, given the padding token.
    `labels`: returns the label names of the head from the examples, empty for a regression of one
    number; None if there is no head. `has_accuracy`: whether each prediction is right or wrong.
    `problem_type`: that of a sequence classifier, as in `adapter.heads`. `audio`: whether the
    source is audio. `vectors`: how an embedder computes vectors.
    """

    name: str
    read: Callable[[Source], Sequence[Any]]
    encode: Encode
    loss: LossFunction
    collate: Callable[[int], Collate] = Collator
    labels: Callable[[Sequence[Any]], tuple[str, ...]] | None = None
    has_accuracy: bool = True
    problem_type: str | None = None
    audio: bool = False
    vectors: Vectors | None = None

    @property
    def auto_class(self) -> str:
        """transformers' class that loads the base."""
        return _SPEECH_CLASS if self.audio else TASK_TABLE[self.name].auto_class

    @property
    def peft(self) -> str | None:
        """PEFT's name of the task; None for audio, because PEFT's encoder-decoders take tokens."""
        return None if self.audio else TASK_TABLE[self.name].peft


def _without_labels(
    encode: Callable[[Sequence[Any], PreTrainedTokenizerBase, int], Encoded],
) -> Encode:
    return lambda examples, _, tokenizer, longest: encode(examples, tokenizer, longest)


def _classifier(
    problem_type: str, read: Callable[[Source], Sequence[Any]], loss: LossFunction
) -> Task:
    measured = problem_type == REGRESSION
    return Task(
        name=SEQUENCE_CLASSIFICATION,
        read=read,
        encode=text_features,
        loss=loss,
        labels=examples.value_names if measured else examples.label_names,
        has_accuracy=not measured,
        problem_type=problem_type,
    )


_SPEECH_CLASS: Final = "AutoModelForSpeechSeq2Seq"

_PROBLEMS: Final[Mapping[str, Task]] = {
    task.problem_type: task
    for task in (
        _classifier(SINGLE_LABEL, examples.read_labeled_texts, classification_loss),
        _classifier(MULTI_LABEL, examples.read_multi_label_texts, multi_label_loss),
        _classifier(REGRESSION, examples.read_measured_texts, regression_loss),
    )
    if task.problem_type is not None
}

_TASKS: Final[Mapping[str, Task]] = {
    task.name: task
    for task in (
        Task(
            name=CAUSAL_LM,
            read=examples.read_conversations,
            encode=_without_labels(conversation_features),
            loss=causal_lm_loss,
            has_accuracy=False,
        ),
        Task(
            name=TOKEN_CLASSIFICATION,
            read=examples.read_tagged_words,
            encode=word_features,
            loss=classification_loss,
            labels=examples.label_names,
        ),
        Task(
            name=SEQ2SEQ_LM,
            read=examples.read_translations,
            encode=_without_labels(translation_features),
            loss=seq2seq_loss,
            collate=TargetCollator,
        ),
    )
}


def task_of(config: TrainConfig, base: Path | None = None, adapter: Path | None = None) -> Task:
    """The task that `config` selects.

    The files beside `adapter`, or else beside `base`, specify how an embedder computes vectors. An
    encoder-decoder takes audio or text, depending on the model in `base`.

    Raises:
        ModelError: a speech model whose files do not specify its features.
        BundleError: an embedder's files cannot be read, or are not supported.
    """
    if config.task == SEQ2SEQ_LM and base is not None and takes_audio(base):
        audio = AudioSettings.of(base)
        return replace(
            _TASKS[SEQ2SEQ_LM],
            read=examples.read_spoken_texts,
            encode=_without_labels(audio.encode),
            collate=audio.collator,
            audio=True,
        )
    if config.task == SEQUENCE_CLASSIFICATION:
        return _PROBLEMS[TRAINED_PROBLEMS[config.problem_type]]
    if config.task == IMAGE_CLASSIFICATION:
        return _image_classifier(base)
    if config.task == FEATURE_EXTRACTION:
        return _embedder(config.embedding_loss, vectors_of(config, base, adapter))
    return _TASKS[config.task]


def _image_classifier(base: Path | None) -> Task:
    """The task for the model in `base`; ModelError if its preprocessing of images is unknown."""
    images = ImageSettings.of(base or Path())
    return Task(
        name=IMAGE_CLASSIFICATION,
        read=read_labeled_images,
        encode=images.encode,
        loss=image_loss,
        collate=images.collator,
        labels=examples.label_names,
    )


def _embedder(loss: str, vectors: Vectors) -> Task:
    scored = loss in SCORED_LOSSES
    read = (
        partial(read_scored_pairs, bounded=loss == "cosine")
        if scored
        else partial(read_text_pairs, triplets=loss == "triplet")
    )
    return Task(
        name=FEATURE_EXTRACTION,
        read=read,
        encode=_without_labels(partial(embedder_features, vectors=vectors)),
        loss=partial(embedding_loss, vectors=vectors, name=loss),
        collate=partial(RowsCollator, scored=scored),
        has_accuracy=not scored,
        vectors=vectors,
    )
