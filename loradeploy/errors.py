"""Every error that loradeploy raises on purpose.

    LoraDeployError             a mistake that its reader can mend: what, where, what to do
    ├── UsageError              options that do not go together, a value out of range
    ├── DataError               training or evaluation data that cannot be used
    ├── ModelError              a base model that is missing or cannot be used
    ├── AdapterError            an adapter that cannot be read or is refused
    │   └── AdapterMismatchError    an adapter that does not fit this base model or bundle
    ├── UnknownAdapterError     a name that was never loaded (also a KeyError)
    ├── BudgetError             an adapter that takes more memory than a session may use
    ├── TrainingError           a training run that cannot go on
    │   └── TrainingInterruptedError    one that a signal stopped; there is a checkpoint of it
    ├── RunError                a run that ONNX Runtime could not do
    ├── DeviceError             an execution provider that computes something else than the CPU
    ├── BundleError             a bundle that is broken, or does not match its manifest
    ├── ExportError             a model or graph that cannot be exported in the way asked for
    ├── OutputError             a file that cannot be written, as on a full disk (also an OSError)
    └── MissingDependencyError  a part of loradeploy whose extra is not installed

A message names a parameter of the Python function as code, in backticks, with the value as Python
writes it where one is advised: `merge`, `branches=False`, `layout="rows"`, `adapters=["NAME=DIR"]`.
The command line shows its flag in the place of it, --merge, --no-branches, --layout rows and
--adapter NAME=DIR; a parameter without a flag stays as it is.

The command line prints the message and exits with 2, or with the status of the signal that
interrupted it; anything else is a defect of loradeploy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Final

from loradeploy.printable import printable

# What colors the words of a library on a terminal.
_COLORS: Final = re.compile(r"\x1b\[[0-9;]*m")
# Where a message of one line would begin another.
_BREAK: Final = re.compile(r"\s*\n\s*")


class LoraDeployError(Exception):
    """A mistake that the reader of the message can mend.

    Names and values of others are in the message: it is printable, and one line.
    """

    def __str__(self) -> str:
        # That of Exception: KeyError's is the repr, OSError's has a number.
        return printable(_BREAK.sub(" ", Exception.__str__(self)))


class UsageError(LoraDeployError):
    """Options that do not go together, or a value out of its range."""


class DataError(LoraDeployError):
    """Training or evaluation data that cannot be used."""


class ModelError(LoraDeployError):
    """A base model that is missing or cannot be used."""


class AdapterError(LoraDeployError):
    """An adapter that cannot be read or is refused."""


class AdapterMismatchError(AdapterError):
    """An adapter that does not fit this base model or bundle."""


class UnknownAdapterError(LoraDeployError, KeyError):
    """An adapter name that was never loaded."""


class BudgetError(LoraDeployError):
    """An adapter that takes more memory than a session may use for all."""


class TrainingError(LoraDeployError):
    """A training run that cannot go on."""


class TrainingInterruptedError(TrainingError):
    """A training run that a signal stopped, with a checkpoint to go on from.

    `status`: the exit status of a process that the signal ended, 128 + its number.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class RunError(LoraDeployError):
    """A run that ONNX Runtime could not do: no memory, or what its checks of inputs found."""


class DeviceError(LoraDeployError):
    """An execution provider that computes something else than the CPU, or drops adapters."""


class BundleError(LoraDeployError):
    """A bundle that is broken or does not match its manifest."""


class ExportError(LoraDeployError):
    """A model or graph that cannot be exported in the way asked for."""


class OutputError(LoraDeployError, OSError):
    """A file or directory that cannot be written: the disk is full, or is not ours to write.

    `filename` is its path, `strerror` the reason with what to do, `errno` the system's number.
    """

    def __init__(
        self, path: str | os.PathLike[str], reason: str, number: int | None = None
    ) -> None:
        super().__init__(f"{os.fspath(path)} cannot be written: {reason}")
        self.filename, self.strerror, self.errno = os.fspath(path), reason, number

    def __reduce__(self) -> tuple[type[OutputError], tuple[str, str, int | None]]:
        return type(self), (self.filename, self.strerror or "", self.errno)


class MissingDependencyError(LoraDeployError):
    """A part of loradeploy whose extra is not installed."""


# Characters that one thing in a message may take, and all that is listed in one together: with the
# words around them a message stays one that is read.
_ONE: Final = 120
_NAMES: Final = 160
_PROBLEMS: Final = 240


def first_line(problem: BaseException) -> str:
    """The first line of what an error of somebody else's says, or its name where it says nothing.

    They are put into a message of one line, and many say more than one, or pages in one.
    """
    said = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return shortened(printable(_COLORS.sub("", said)), _NAMES)


def kind_and_line(problem: BaseException) -> str:
    """The kind of an error of somebody else's, and the first line of what it says."""
    kind, said = type(problem).__name__, first_line(problem)
    return f"{kind}: {'no message' if said == kind else said}"


def shortened(text: str, most: int = _ONE) -> str:
    """`text` in at most `most` characters: its beginning and its end, which tell the most of it."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 1]}…{text[len(text) - end :]}"


def shown(value: object, most: int = 60) -> str:
    """A value out of a file, as Python writes it, in at most `most` characters."""
    try:
        text = repr(value)
    except Exception:  # of an object of any kind; of an integer of more than 4300 digits too
        text = f"a {type(value).__name__} that cannot be shown"
    return shortened(text, most)


def listed(problems: Sequence[str], most: int = 4, *, room: int = _PROBLEMS) -> str:
    """The first of `problems` in one line, and how many there are besides.

    The first one always, then as many of `most` as fit into `room` characters.
    """
    return _bounded(problems, most, room, joint="; ", last="; and ")


def listed_names(
    values: Iterable[str], most: int = 6, *, room: int = _NAMES, none: str = "none"
) -> str:
    """The first of the names `values`, and how many there are besides; `none` where there is none.

    The first one always, then as many of `most` as fit into `room` characters.
    """
    found = list(values)
    return _bounded(found, most, room, joint=", ", last=" and ") if found else none


def _bounded(texts: Sequence[str], most: int, room: int, *, joint: str, last: str) -> str:
    told: list[str] = []
    for text in texts[:most]:
        if told and sum(map(len, told)) + len(joint) * len(told) + len(text) > room:
            break
        told.append(shortened(text, room))
    more = f"{last}{len(texts) - len(told)} more" if len(texts) > len(told) else ""
    return joint.join(told) + more
