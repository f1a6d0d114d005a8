"""Classifier heads: the number of labels, their names, and the problem type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.errors import AdapterError, LoraDeployError, shown
from loradeploy.files import MAX_TEXT_BYTES, read_json, read_text
from loradeploy.names import MODEL_CONFIG_NAME
from loradeploy.parsing import parse_json

if TYPE_CHECKING:
    from loradeploy.adapter.adapter import Adapter

# transformers' names, as in the `problem_type` of a config.json.
SINGLE_LABEL: Final = "single_label_classification"
MULTI_LABEL: Final = "multi_label_classification"
REGRESSION: Final = "regression"
PROBLEM_TYPES: Final = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
# Used instead of these for a head whose labels and problem type no file declares.
UNDECLARED: Final = "undeclared"
# The values of the training setting `problem_type`, with transformers' names.
TRAINED_PROBLEMS: Final[Mapping[str, str]] = {
    "single-label": SINGLE_LABEL,
    "multi-label": MULTI_LABEL,
    "regression": REGRESSION,
}

_MOST_LABELS: Final = 2**20  # the maximum for the keys of id2label

# Keys in the metadata of an adapter's weight file. PEFT ignores them.
LABELS_KEY: Final = "loradeploy.labels"
PROBLEM_KEY: Final = "loradeploy.problem_type"
_SETTINGS_NAME: Final = "train.yaml"
_SETTING: Final = re.compile(r"^problem_type: *(\S+) *$", re.MULTILINE)

# The head parameters whose first dimension is the number of labels.
LABELED: Final = re.compile(r"(.*\.)?(classifier|score|classifier\.out_proj)\.weight")


@dataclass(frozen=True)
class Head:
    """The meaning of a classifier's outputs, for an adapter or for the base model.

    `labels`: the label names in the order of the outputs; None for the base's labels.
    `problem_type`: one of PROBLEM_TYPES for a sequence classifier; UNDECLARED for a sequence or
    token classifier whose files do not declare what its outputs mean; else None.
    `outputs`: the number of the graph's outputs, from the first, that belong to this head; None if
    all do. `trained`: False for the base if the checkpoint has no weights for its head.
    """

    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    outputs: int | None = None
    trained: bool = True

    @property
    def declared(self) -> bool:
        """Whether the meaning of the outputs is known."""
        return self.problem_type != UNDECLARED


def label_parameters(adapter: Adapter) -> tuple[str, ...]:
    """The names of the adapter's head weights that have one row per label."""
    return tuple(
        name
        for name, values in sorted(adapter.saved.items())
        if values.ndim and LABELED.fullmatch(name)  # other shapes are refused later
    )


def label_count(adapter: Adapter) -> int | None:
    """The number of outputs of the adapter's own head; None if it has no head."""
    counts = [int(adapter.saved[name].shape[0]) for name in label_parameters(adapter)]
    return counts[0] if counts else None


def usual_problem(outputs: int) -> str:
    """The problem type that transformers trains a head of `outputs` for, if none is stated."""
    return REGRESSION if outputs == 1 else SINGLE_LABEL


def head_beside(
    directory: Path, metadata: Mapping[str, str], outputs: int | None, *, sequences: bool
) -> Head:
    """The head that the files of an adapter in `directory` declare; it has `outputs` outputs.

    `metadata`: the metadata of the weight file. What it lacks is read from a config.json beside it,
    where trainers save the model's labels and problem type, and then from the settings of
    loradeploy's own training, because its earlier versions did not write the problem type into the
    metadata. `sequences`: whether the adapter classifies sequences; other heads have no problem
    type. A head that the metadata marks as UNDECLARED remains so unless one of these files states
    its problem type or, for token classification, its label names.

    Raises:
        AdapterError: the files are invalid, or do not have one label name per output.
    """
    labels, problem = _labels(metadata), metadata.get(PROBLEM_KEY)
    undeclared = problem == UNDECLARED
    if undeclared:
        problem = None
    if problem is not None and problem not in PROBLEM_TYPES:
        raise AdapterError(
            f"the metadata {PROBLEM_KEY} is {shown(problem)}, not one of {', '.join(PROBLEM_TYPES)}"
        )
    if labels is not None and outputs is not None and len(labels) != outputs:
        raise AdapterError(f"it names {len(labels)} labels, and its head has {outputs} outputs")
    file = directory / MODEL_CONFIG_NAME
    if outputs is not None and file.is_file() and (labels is None or problem is None):
        config = read_json(file, error=AdapterError)
        if problem is None and sequences:
            problem = stated_problem(config, str(file), error=AdapterError)
        names = config_labels(config, str(file), error=AdapterError, outputs=outputs)
        if labels is None and names is not None and len(names) == outputs:
            labels = None if names == placeholders(outputs) else names
            undeclared = undeclared and sequences
    settings = directory / _SETTINGS_NAME
    if problem is None and outputs is not None and sequences and settings.is_file():
        text = read_text(settings, error=AdapterError, limit=MAX_TEXT_BYTES)
        setting = _SETTING.search(text)
        problem = TRAINED_PROBLEMS.get(setting[1]) if setting else None
    if undeclared and problem is None:
        return Head(labels, UNDECLARED)
    return Head(labels, problem if sequences else None)


def _labels(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    if LABELS_KEY not in metadata:
        return None
    try:
        labels = parse_json(metadata[LABELS_KEY])
    except ValueError:
        labels = None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise AdapterError(f"the metadata {LABELS_KEY} is not a JSON list of names")
    return tuple(labels)


def check_declared(adapter: Adapter) -> None:
    """Raise AdapterError if no file declares what the outputs of the adapter's head mean."""
    if adapter.problem_type == UNDECLARED:
        raise AdapterError(
            "its files do not declare what the outputs of its head mean, because it was converted"
            " from an .onnx_adapter file: state problem_type and id2label in a config.json beside"
            " it"
        )


def problem_of(adapter: Adapter, stated: str | None, outputs: int) -> str:
    """The problem type of `adapter`: its own, else the base's if `stated`, else the usual one.

    `outputs`: the number of outputs of the base's head, for an adapter without a head.

    Raises:
        AdapterError: no file declares what the outputs of its head mean.
    """
    check_declared(adapter)
    # A head that was padded to all of a graph's outputs has names for its own labels only.
    own = len(adapter.labels) if adapter.labels else label_count(adapter)
    return adapter.problem_type or stated or usual_problem(own or outputs)


def stated_problem(
    config: Mapping[str, Any], where: str, *, error: type[LoraDeployError]
) -> str | None:
    """The `problem_type` in a config.json; None if it has none.

    Raises:
        `error`: it is not one of PROBLEM_TYPES.
    """
    value = config.get("problem_type")
    if value is not None and value not in PROBLEM_TYPES:
        raise error(
            f"{where}: problem_type is {shown(value)}, not one of {', '.join(PROBLEM_TYPES)}"
        )
    return value


def config_labels(
    config: Mapping[str, Any],
    where: str,
    *,
    error: type[LoraDeployError],
    outputs: int | None = None,
) -> tuple[str, ...] | None:
    """The label names in a config.json, in the order of the outputs; None if it has none.

    Outputs that id2label does not include are named LABEL_n. `outputs`: the number of outputs, if
    it is known; it is only used if id2label does not include all numbers up to its highest.

    Raises:
        `error`: the keys of its id2label are not numbers, or negative or too large.
    """
    names = config.get("id2label")
    if not isinstance(names, Mapping):
        return None
    try:
        numbered = {int(key): str(name) for key, name in names.items()}
    except (TypeError, ValueError):
        raise error(f"{where}: the keys of id2label are not numbers") from None
    count = max(numbered, default=-1) + 1
    if min(numbered, default=0) < 0 or count > _MOST_LABELS:
        raise error(f"{where}: the keys of id2label are not the numbers of outputs")
    if len(numbered) < count and outputs:
        count = outputs
    return tuple(numbered.get(n, name) for n, name in enumerate(placeholders(count)))


def placeholders(count: int) -> tuple[str, ...]:
    """The names that transformers gives to labels without names."""
    return tuple(f"LABEL_{number}" for number in range(count))
