"""Every error that loradeploy raises on purpose.

    LoraDeployError             a mistake that its reader can mend: what, where, what to do
    ├── UsageError              options that do not go together, a value out of range
    ├── DataError               training or evaluation data that cannot be used
    ├── ModelError              a base model that is missing or cannot be used
    ├── AdapterError            an adapter that cannot be read or is refused
    │   └── AdapterMismatchError    an adapter that does not fit this base model or bundle
    ├── UnknownAdapterError     a name that was never loaded (also a KeyError)
    ├── TrainingError           a training run that cannot go on
    │   └── TrainingInterruptedError    one that a signal stopped; there is a checkpoint of it
    ├── BundleError             a bundle that is broken, or does not match its manifest
    ├── ExportError             a model or graph that cannot be exported in the way asked for
    └── MissingDependencyError  a part of loradeploy whose extra is not installed

The command line prints the message and exits with 2, or with the status of the signal that
interrupted it; anything else is a defect of loradeploy.
"""

from __future__ import annotations

from collections.abc import Sequence


class LoraDeployError(Exception):
    """A mistake that the reader of the message can mend."""


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

    # KeyError shows the repr of its argument; the message is a sentence, show it as one.
    __str__ = Exception.__str__


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


class BundleError(LoraDeployError):
    """A bundle that is broken or does not match its manifest."""


class ExportError(LoraDeployError):
    """A model or graph that cannot be exported in the way asked for."""


class MissingDependencyError(LoraDeployError):
    """A part of loradeploy whose extra is not installed."""


def first_line(problem: BaseException) -> str:
    """The first line of what an error of somebody else's says, or its name where it says nothing.

    They are put into a message of one line, and many say more than one.
    """
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def kind_and_line(problem: BaseException) -> str:
    """The kind of an error of somebody else's, and the first line of what it says."""
    kind, said = type(problem).__name__, first_line(problem)
    return f"{kind}: {'no message' if said == kind else said}"


def listed(problems: Sequence[str], most: int) -> str:
    """The first `most` of `problems` in one line, and how many there are besides."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more
