"""Held-out data as a model reads it: token ids, and the labels that answers are scored by.

It is read, rendered and labeled like training data (see `loradeploy.train.data.examples`), so that
an adapter is scored on exactly the task that it was trained for.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.heads import (
    SINGLE_LABEL,
    TRAINED_PROBLEMS,
)
from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    CLASSIFICATIONS,
    EVALUATED_TASKS,
    FEATURE_EXTRACTION,
    IMAGE_CLASSIFICATION,
    SEQ2SEQ_LM,
)
from loradeploy.bundle.image.pixels import pixel_settings
from loradeploy.bundle.names import PIXEL_VALUES, TOKEN_TYPE_IDS
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.bundle.text.vectors.recipe import recipe_directory
from loradeploy.errors import (
    DataError,
    MissingDependencyError,
    UsageError,
    listed_names,
    prefixing_errors,
    shown,
)
from loradeploy.parity.inputs.row_feeds import Picture, types_of
from loradeploy.parity.inputs.tokens import filled, fixed_length
from loradeploy.parity.report.results import BASE_LABEL
from loradeploy.parity.score.embedded import Embedded, embedded
from loradeploy.parity.score.generated import GeneratedTexts, generated_texts
from loradeploy.parity.score.kinds import kinds_of, label_names
from loradeploy.parity.score.measures import MEASURED

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest
    from loradeploy.parity.context import AdapterUnderTest
    from loradeploy.parity.inputs.tokens import Cases
    from loradeploy.train.model import Checkpoint
    from loradeploy.train.tasks.table import Task

Data = str | os.PathLike[str]
DataByAdapter = Data | Mapping[str, Data] | Iterable[Data]

_SPLIT: Final = "test"  # the split of a dataset with splits
_DIGITS: Final = 15  # hexadecimal digits of a digest that fit into 63 bits


@dataclass(frozen=True)
class Example:
    """An example. `labels`: one for each token, or the class of a text, or its numbers.

    `types`: the token types of a pair of texts. `picture`: the image that the tokens stand for.
    """

    tokens: tuple[int, ...]
    labels: tuple[float, ...]
    types: tuple[int, ...] | None = None
    picture: Picture | None = None


@dataclass(frozen=True)
class HeldOut:
    """The examples that one adapter, or the base, is scored on.

    `kind`: a key of `measures.MEASURED`. `source`: the file or dataset; `available`: number of
    examples in it; `taken`: number of examples sampled. `labels`: the names of the outputs.
    `embedded`: the data of an embedder, whose `examples` are texts. `generated`: the data of an
    encoder-decoder, which has no `examples`.
    """

    kind: str
    examples: tuple[Example, ...]
    source: str
    available: int
    taken: int
    labels: tuple[str, ...] = ()
    embedded: Embedded | None = None
    generated: GeneratedTexts | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that are computed."""
        return MEASURED[self.kind]


def read_held_out(
    bundle: Path,
    manifest: Manifest,
    model: Path,
    adapters: Sequence[AdapterUnderTest],
    evaluate: DataByAdapter | None,
    *,
    examples: int,
    seed: int,
) -> dict[str | None, HeldOut]:
    """Read the held-out data, by adapter name (None is the base); empty without `evaluate`.

    `evaluate`: one data source for all, or a mapping or a list of `[NAME=]DATA` for adapters of
    different tasks. `examples` examples are sampled from each with `seed`. A classifier's base is
    scored only if there are no adapters, since it rarely has a trained head.

    Raises:
        UsageError: as `check_data`.
        DataError: the data cannot be read, is for another task, or has unknown labels.
        MissingDependencyError: a package that reads training data is not installed.
    """
    if evaluate is None:
        return {}
    try:
        from loradeploy.train.model import open_checkpoint
    except ImportError as problem:
        raise MissingDependencyError(
            f"held-out data is read as training data is, and {problem.name} is not installed:"
            " pip install 'loradeploy[train]'"
        ) from None
    checkpoint = open_checkpoint(model, texts=manifest.task != IMAGE_CLASSIFICATION)
    labels = label_names(bundle, manifest, adapters)
    kinds = kinds_of(bundle, manifest, adapters)
    places = {tested.name: tested.path for tested in adapters}
    found = {}
    for name, data in _data_by_adapter(evaluate, _scored(manifest, adapters)).items():
        sample = _Sample(name, data, examples, seed)
        if manifest.task == FEATURE_EXTRACTION:
            base = model if recipe_directory(bundle) is None else bundle
            task = _embedder(data, base, None if name is None else places[name])
            found[name] = _with_length(_embedded(sample, task, checkpoint), bundle, manifest)
        elif manifest.task == SEQ2SEQ_LM:
            found[name] = _generated(sample, checkpoint)
        else:
            found[name] = _labeled(sample, labels[name], kinds[name], manifest, checkpoint)
    return found


def check_data(
    manifest: Manifest,
    adapters: Sequence[AdapterUnderTest],
    evaluate: DataByAdapter | None,
    examples: int,
) -> None:
    """Refuse held-out data that is missing or cannot be used, before anything is loaded.

    Raises:
        UsageError: a task without a metric, an unknown adapter name, or fewer than 2 `examples`.
        DataError: it does not exist.
    """
    from loradeploy.train.data.sources import Source, check_exists

    if evaluate is None:
        return
    if manifest.task not in EVALUATED_TASKS:
        raise UsageError(
            f"no task metric is known for {manifest.task}, only for {', '.join(EVALUATED_TASKS)}"
        )
    if examples < 2:
        raise UsageError(f"{examples} examples to evaluate on: give 2 or more")
    for data in _data_by_adapter(evaluate, _scored(manifest, adapters)).values():
        check_exists(Source(data, _SPLIT), "held-out data")


def _scored(manifest: Manifest, adapters: Sequence[AdapterUnderTest]) -> list[str | None]:
    """The adapters that are scored, and the base (None).

    A merged bundle has no base, and a classifier's base rarely has a trained head.
    """
    names: list[str | None] = [tested.name for tested in adapters]
    if manifest.mode != "merged" and (manifest.task not in CLASSIFICATIONS or not names):
        names.insert(0, None)
    return names


def with_types(cases: Cases, held_out: Mapping[str | None, HeldOut]) -> Cases:
    """Add the token types of held-out pairs of texts, and held-out images, to `cases.known`.

    Raises:
        DataError: a text has the same tokens as a pair of texts.
    """
    examples = [example for data in held_out.values() for example in data.examples]
    pictures = {e.tokens: e.picture for e in examples if e.picture is not None}
    known = {tokens: cases.known.get(tokens) for tokens in cases.given}
    rows = [(tokens, None if isinstance(t, Picture) else t) for tokens, t in known.items()]
    rows += [(e.tokens, e.types) for e in examples if e.picture is None]
    return replace(cases, known={**types_of(rows), **pictures})


def _data_by_adapter(
    evaluate: DataByAdapter, names: Sequence[str | None]
) -> dict[str | None, Data]:
    """Return the data by adapter, for all `names` or for those that `evaluate` names."""
    known = {name or BASE_LABEL: name for name in names}
    given: list[tuple[str, Data]] = []
    if isinstance(evaluate, Mapping):
        given += evaluate.items()
    else:
        for data in [evaluate] if isinstance(evaluate, str | os.PathLike) else evaluate:
            name, equals, rest = os.fspath(data).partition("=")
            given.append((name, rest) if equals and name in known else ("", data))
    found: dict[str | None, Data] = {}
    for name, data in given:
        if name and name not in known:
            raise UsageError(
                f"{shown(name)} is not scored, only {listed_names(known)}: evaluate one of it"
            )
        for one in [known[name]] if name else names:
            if one in found:
                raise UsageError(
                    f"two data sets to evaluate {one or BASE_LABEL} on: give one, or one for each"
                    ' adapter, `evaluate=["NAME=DATA"]`'
                )
            found[one] = data
    return found


@dataclass(frozen=True)
class _Sample:
    """`count` examples of `data`, drawn with `seed`, for the adapter `name` or the base (None)."""

    name: str | None
    data: Data
    count: int
    seed: int

    def draw(self, task: Task) -> tuple[list[Any], int]:
        """Sample examples; return them, and how many there are."""
        from loradeploy.train.data.sources import Source, rows

        source = Source(self.data, _SPLIT)
        if task.name == CAUSAL_LM:
            # Otherwise a labeled text would be accepted as plain text.
            where, row = next(rows(source), ("", {}))
            if "label" in row:
                raise DataError(
                    f"{where}: has a label, which is data for a classifier: this bundle is"
                    f" {task.name}"
                )
        read = task.read(source)
        chosen = random.Random(self.seed).sample(range(len(read)), min(self.count, len(read)))
        if len(chosen) < 2:
            raise DataError(
                f"{source} contains one example, which gives no interval: give 2 or more"
            )
        return [read[index] for index in sorted(chosen)], len(read)


def _labeled(
    sample: _Sample,
    labels: Sequence[str],
    kind: str,
    manifest: Manifest,
    checkpoint: Checkpoint,
) -> HeldOut:
    """Return the data of a language model, or of a classifier with these `labels`."""
    from loradeploy.train.config import TrainConfig
    from loradeploy.train.tasks.table import task_of

    settings = {kind: setting for setting, kind in TRAINED_PROBLEMS.items()}
    setting = settings.get(kind, TrainConfig.problem_type)
    config = checkpoint.within(TrainConfig(task=manifest.task, problem_type=setting))
    task = task_of(config, checkpoint.directory)
    drawn, available = sample.draw(task)
    with prefixing_errors(sample.name or BASE_LABEL, DataError):
        names = _numbered(drawn, labels, kind)
        if manifest.task == IMAGE_CLASSIFICATION:
            coded = _pictures(drawn, names, task, checkpoint, manifest)
        else:
            coded = _coded(drawn, names, task, checkpoint, config.max_length)
    source = os.fspath(sample.data)
    return HeldOut(kind, coded, source, available, len(drawn), tuple(labels))


def _generated(sample: _Sample, checkpoint: Checkpoint) -> HeldOut:
    """Return the data of an encoder-decoder."""
    from loradeploy.train.config import TrainConfig
    from loradeploy.train.tasks.table import task_of

    config = checkpoint.within(TrainConfig(task=SEQ2SEQ_LM))
    task = task_of(config, checkpoint.directory)
    drawn, available = sample.draw(task)
    features = checkpoint.encode(task, drawn, (), config.max_length).features
    texts = generated_texts(drawn, features, audio=task.audio)
    source = os.fspath(sample.data)
    return HeldOut(texts.kind, (), source, available, len(drawn), generated=texts)


def _coded(
    drawn: Sequence[Any],
    names: Sequence[str],
    task: Task,
    checkpoint: Checkpoint,
    longest: int,
) -> tuple[Example, ...]:
    """Return the examples as tokens."""
    features = checkpoint.encode(task, drawn, names, longest).features
    return tuple(
        Example(
            tuple(feature["input_ids"]),
            tuple(feature["labels"])
            if isinstance(feature["labels"], list)
            else (feature["labels"],),
            tuple(feature[TOKEN_TYPE_IDS]) if TOKEN_TYPE_IDS in feature else None,
        )
        for feature in features
    )


def _numbered(drawn: Sequence[Any], names: Sequence[str], kind: str) -> Sequence[str]:
    """Return the `names` of the outputs, or their numbers if all labels in `drawn` are numbers."""
    if kind != SINGLE_LABEL:
        return names
    given = {example.label for example in drawn}
    numbers = not given <= set(names) and all(label.isdecimal() for label in given)
    return tuple(map(str, range(len(names)))) if numbers else names


def _pictures(
    drawn: Sequence[Any],
    names: Sequence[str],
    task: Task,
    checkpoint: Checkpoint,
    manifest: Manifest,
) -> tuple[Example, ...]:
    """Return the examples of images; the token of each is derived from the digest of its file."""
    settings = pixel_settings(checkpoint.directory)
    assert settings is not None  # or the task would not have been made
    (taken,) = (spec.shape[1:] for spec in manifest.inputs if spec.name == PIXEL_VALUES)
    found = []
    for feature in checkpoint.encode(task, drawn, names, checkpoint.max_length).features:
        picture = Picture(Path(feature["image"]), settings)
        if (made := picture.values().shape) != taken:
            raise DataError(
                f"{picture.file} becomes pixel values {list(made)}, the graph takes {list(taken)}"
            )
        token = int(feature["digest"].rpartition(":")[2][:_DIGITS], 16)
        found.append(Example((token,), (feature["labels"],), picture=picture))
    return tuple(found)


def _embedder(data: Data, base: Path, adapter: Path | None) -> Task:
    """Return the task for texts of `data`, with the settings beside `adapter`, else in `base`."""
    from loradeploy.train.config import RANKING_LOSSES, SCORED_LOSSES, TrainConfig
    from loradeploy.train.data.sources import Source, rows
    from loradeploy.train.tasks.embedding.data import is_scored
    from loradeploy.train.tasks.table import task_of

    scored = is_scored(next(rows(Source(data, _SPLIT)), ("", {})))
    loss = (SCORED_LOSSES if scored else RANKING_LOSSES)[0]
    return task_of(TrainConfig(task=FEATURE_EXTRACTION, embedding_loss=loss), base, adapter)


def _embedded(sample: _Sample, task: Task, checkpoint: Checkpoint) -> HeldOut:
    """Return the data of an embedder."""
    assert task.vectors is not None
    drawn, available = sample.draw(task)
    with prefixing_errors(sample.name or BASE_LABEL, DataError):
        features = checkpoint.encode(task, drawn, (), checkpoint.max_length).features
        found = embedded(features, task.vectors.recipe, scored=not task.has_accuracy)
    texts = tuple(Example(tokens, ()) for tokens, _ in found.texts)
    source = os.fspath(sample.data)
    return HeldOut(found.compared.kind, texts, source, available, len(drawn), embedded=found)


def _with_length(data: HeldOut, bundle: Path, manifest: Manifest) -> HeldOut:
    """Fill the texts up to the length that the graph takes, if it takes only one."""
    full = fixed_length(manifest)
    if full is None:
        return data
    pad = Tokenizer(bundle).pad_id
    filled_up = (replace(e, tokens=filled(e.tokens, full, pad)) for e in data.examples)
    return replace(data, examples=tuple(filled_up))
