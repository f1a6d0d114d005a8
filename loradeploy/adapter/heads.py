"""What a classifier's head answers: how many labels, their names, and what its numbers mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.errors import AdapterError, LoraDeployError, shown
from loradeploy.files import MAX_TEXT_BYTES, read_json, read_text
from loradeploy.parsing import parse_json

if TYPE_CHECKING:
    from loradeploy.adapter.adapter import Adapter

# transformers' names, as in the `problem_type` of a config.json.
SINGLE_LABEL: Final = "single_label_classification"
MULTI_LABEL: Final = "multi_label_classification"
REGRESSION: Final = "regression"
PROBLEM_TYPES: Final = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
# In their place: there is a head, and nothing declares its labels or its problem type.
UNDECLARED: Final = "undeclared"
# The names of the setting of training.
TRAINED_PROBLEMS: Final[Mapping[str, str]] = {
    "single-label": SINGLE_LABEL,
    "multi-label": MULTI_LABEL,
    "regression": REGRESSION,
}

# Of the metadata of an adapter's file of weights, which PEFT ignores.
LABELS_KEY: Final = "loradeploy.labels"
PROBLEM_KEY: Final = "loradeploy.problem_type"
_SETTINGS_NAME: Final = "train.yaml"
_SETTING: Final = re.compile(r"^problem_type: *(\S+) *$", re.MULTILINE)

# The parameter of a head whose first dimension is the number of labels, at the end of its name.
LABELED: Final = re.compile(r"(.*\.)?(classifier|score|classifier\.out_proj)\.weight")


@dataclass(frozen=True)
class Head:
    """What the answers of an adapter, or of the base, are.

    `labels`: their names in the order of the outputs, None where they are the base's.
    `problem_type`: one of PROBLEM_TYPES, of a sequence classifier; UNDECLARED of a classifier of
    either kind whose files cannot say what its answers are; else None.
    `outputs`: how many of the graph's are its own, the first ones; None of all.
    """

    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    outputs: int | None = None

    @property
    def declared(self) -> bool:
        """Whether it is known what the answers are."""
        return self.problem_type != UNDECLARED


def label_parameters(adapter: Adapter) -> tuple[str, ...]:
    """The weights of the adapter's heads by label."""
    return tuple(name for name in sorted(adapter.saved) if LABELED.fullmatch(name))


def label_count(adapter: Adapter) -> int | None:
    """How many outputs the adapter's own head has; None where it brings none."""
    counts = [int(adapter.saved[name].shape[0]) for name in label_parameters(adapter)]
    return counts[0] if counts else None


def usual_problem(outputs: int) -> str:
    """What transformers trains a head of so many outputs for, where nothing says."""
    return REGRESSION if outputs == 1 else SINGLE_LABEL


def head_beside(
    directory: Path, metadata: Mapping[str, str], outputs: int | None, *, sequences: bool
) -> Head:
    """What the files of an adapter declare of its head, which has so many `outputs`.

    `metadata`: of its file of weights. Where that is silent, a config.json beside it has the names
    and the type, as trainers save the model's; and the settings of loradeploy's own training, which
    did not write the type into the weights always. `sequences`: whether it classifies sequences,
    which alone have a problem type. Where the metadata marks the head as UNDECLARED, it is until
    such a file states the type, or of token classification the names.

    Raises:
        AdapterError: the files are broken, or name another number of labels than the head has.
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
    file = directory / "config.json"
    if outputs is not None and file.is_file() and (labels is None or problem is None):
        config = read_json(file, error=AdapterError)
        if problem is None and sequences:
            problem = stated_problem(config, str(file), error=AdapterError)
        names = config_labels(config, str(file), error=AdapterError)
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
    """Raise AdapterError if nothing declares what the answers of the adapter's head are."""
    if adapter.problem_type == UNDECLARED:
        raise AdapterError(
            "its files do not declare what its head answers, because it was converted from an"
            " .onnx_adapter file: state problem_type and id2label in a config.json beside it"
        )


def problem_of(adapter: Adapter, stated: str | None, outputs: int) -> str:
    """The problem type of `adapter`: its own, else the base's if `stated`, else the usual one.

    `outputs`: how many the base's head has, for an adapter that brings no head.

    Raises:
        AdapterError: its head is one that nothing declares.
    """
    check_declared(adapter)
    # One that was given outputs for all of a graph's labels names its own alone.
    own = len(adapter.labels) if adapter.labels else label_count(adapter)
    return adapter.problem_type or stated or usual_problem(own or outputs)


def stated_problem(
    config: Mapping[str, Any], where: str, *, error: type[LoraDeployError]
) -> str | None:
    """The `problem_type` of a config.json; None where it has none.

    Raises:
        `error`: it is none of PROBLEM_TYPES.
    """
    value = config.get("problem_type")
    if value is not None and value not in PROBLEM_TYPES:
        raise error(
            f"{where}: problem_type is {shown(value)}, not one of {', '.join(PROBLEM_TYPES)}"
        )
    return value


def config_labels(
    config: Mapping[str, Any], where: str, *, error: type[LoraDeployError]
) -> tuple[str, ...] | None:
    """The names of a classifier's outputs in a config.json; None where it has none.

    Raises:
        `error`: its id2label is broken.
    """
    names = config.get("id2label")
    if not isinstance(names, Mapping):
        return None
    try:
        return tuple(str(names[key]) for key in sorted(names, key=int))
    except (TypeError, ValueError):
        raise error(f"{where}: the keys of id2label are not numbers") from None


def placeholders(count: int) -> tuple[str, ...]:
    """transformers' names of labels that have none."""
    return tuple(f"LABEL_{number}" for number in range(count))
