"""Every error that loradeploy raises on purpose.

    LoraDeployError             an error the user can fix: what, where, what to do
    ├── UsageError              options that do not go together, a value out of range
    ├── DataError               training or evaluation data that cannot be used
    ├── ModelError              a base model that is missing or cannot be used
    ├── AdapterError            an adapter that cannot be read or is refused
    │   ├── AdapterMismatchError    an adapter that does not fit this base model or bundle
    │   └── AdapterStoreError       a store that cannot give an adapter now: try again
    ├── UnknownAdapterError     a name that was never loaded (also a KeyError)
    ├── BudgetError             an adapter or a batch that exceeds a memory budget
    ├── TrainingError           a training run that cannot continue
    │   └── TrainingInterruptedError    stopped by a signal, with a checkpoint
    ├── RunError                a run that failed in ONNX Runtime
    ├── EngineError             a request that an engine does not serve
    │   ├── EngineFullError         the queue is full: try again after `retry_after` seconds
    │   ├── EngineClosedError       the engine is closed or draining
    │   └── DeadlineError           the request's deadline passed before it ended
    ├── DeviceError             an execution provider whose results differ from the CPU's
    ├── OperatorError           the operators' library cannot be built, or cannot be used here
    ├── BundleError             a bundle that is broken, or does not match its manifest
    ├── ExportError             a model or graph that cannot be exported as requested
    ├── OutputError             a file that cannot be written, as on a full disk (also an OSError)
    └── MissingDependencyError  a part of loradeploy whose extra is not installed

A message names parameters of the Python function in backticks, with a value in Python's syntax if
it suggests one: `merge`, `branches=False`, `layout="rows"`, `adapters=["NAME=DIR"]`. The command
line replaces them by its flags: --merge, --no-branches, --layout rows and --adapter NAME=DIR. A
parameter without a flag is unchanged.

The command line prints the message and exits with 2, or with the status of the signal that
interrupted it; any other exception is a defect of loradeploy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from loradeploy.printable import printable

# Terminal colors in messages of libraries.
_COLORS: Final = re.compile(r"\x1b\[[0-9;]*m")
# Line breaks, which a message must not contain.
_BREAK: Final = re.compile(r"\s*\n\s*")


class LoraDeployError(Exception):
    """An error that the user can fix.

    The message may contain untrusted names and values; it is printed as one printable line of a
    limited length.
    """

    def __str__(self) -> str:
        # Exception.__str__, because KeyError's is a repr and OSError's has a number.
        return printable(_BREAK.sub(" ", shortened(Exception.__str__(self), MESSAGE)))


class UsageError(LoraDeployError):
    """Options that cannot be combined, or a value out of range."""


class DataError(LoraDeployError):
    """Training or evaluation data that cannot be used."""


class ModelError(LoraDeployError):
    """A base model that is missing or cannot be used."""


class AdapterError(LoraDeployError):
    """An adapter that cannot be read or is refused."""


class AdapterMismatchError(AdapterError):
    """An adapter that does not fit this base model or bundle."""


class AdapterStoreError(AdapterError):
    """An adapter store that is temporarily unavailable; reading may succeed later."""


class UnknownAdapterError(LoraDeployError, KeyError):
    """An adapter name that was never loaded."""


class BudgetError(LoraDeployError):
    """An adapter, or a batch with its cache, that exceeds a memory budget."""


class TrainingError(LoraDeployError):
    """A training run that cannot continue."""


class TrainingInterruptedError(TrainingError):
    """A training run that a signal stopped, with a checkpoint to resume from.

    `status`: the exit status of a process that the signal ended, 128 + its number.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class RunError(LoraDeployError):
    """A run that failed in ONNX Runtime: out of memory, or invalid inputs."""


class EngineError(LoraDeployError):
    """A request that an engine does not process."""


class EngineFullError(EngineError):
    """An engine whose queue of waiting requests is full.

    `retry_after`: seconds after which there may be room.
    """

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosedError(EngineError):
    """An engine that is closed, draining, or was ended by a defect."""


class DeadlineError(EngineError):
    """A request whose deadline passed before it ended."""


class DeviceError(LoraDeployError):
    """An execution provider whose results differ from the CPU's, or that ignores adapters."""


class OperatorError(LoraDeployError):
    """The library of the operator cannot be built, or not be used by this session."""


class BundleError(LoraDeployError):
    """A bundle that is broken or does not match its manifest."""


class ExportError(LoraDeployError):
    """A model or graph that cannot be exported as requested."""


class OutputError(LoraDeployError, OSError):
    """A file or directory that cannot be written: the disk is full, or permission is denied.

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


# Maximum characters of a message, of one value in it, and of a list of names or problems.
MESSAGE: Final = 4000
_ONE: Final = 120
_NAMES: Final = 160
_PROBLEMS: Final = 240


@contextmanager
def prefixing_errors(name: object, kind: type[LoraDeployError] = AdapterError) -> Iterator[None]:
    """Prefix the message of an error of `kind` that is raised inside with `name`.

    An OutputError is unchanged: its message is about a file.
    """
    try:
        yield
    except OutputError:
        raise
    except kind as problem:
        raise type(problem)(f"{name}: {problem}") from None


def first_line(problem: BaseException) -> str:
    """The first line of the message of another library's error, or its class name if it is empty.

    Long lines are shortened, for use in a message of one line.
    """
    text = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return shortened(printable(_COLORS.sub("", text)), _NAMES)


def kind_and_line(problem: BaseException) -> str:
    """The class name of another library's error, and the first line of its message."""
    kind, text = type(problem).__name__, first_line(problem)
    return f"{kind}: {'no message' if text == kind else text}"


def shortened(text: str, most: int = _ONE) -> str:
    """`text` in at most `most` characters: its beginning and its end."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 1]}…{text[len(text) - end :]}"


def shown(value: object, most: int = 60) -> str:
    """The repr of an untrusted value, in at most `most` characters."""
    try:
        text = repr(value)
    except Exception:  # any object may raise; so do integers of more than 4300 digits
        text = f"a {type(value).__name__} that cannot be shown"
    return shortened(text, most)


def listed(problems: Sequence[str], most: int = 4, *, width: int = _PROBLEMS) -> str:
    """The first of `problems` in one line, and the number of the others.

    At least one and at most `most`, as many as fit into `width` characters.
    """
    return _bounded(problems, most, width, joint="; ", last="; and ")


def listed_names(
    values: Iterable[str], most: int = 6, *, width: int = _NAMES, none: str = "none"
) -> str:
    """The first of the names `values`, and the number of the others; `none` if empty.

    At least one and at most `most`, as many as fit into `width` characters.
    """
    found = list(values)
    return _bounded(found, most, width, joint=", ", last=" and ") if found else none


def _bounded(texts: Sequence[str], most: int, width: int, *, joint: str, last: str) -> str:
    texts_shown: list[str] = []
    for text in texts[:most]:
        if (
            texts_shown
            and sum(map(len, texts_shown)) + len(joint) * len(texts_shown) + len(text) > width
        ):
            break
        texts_shown.append(shortened(text, width))
    more = f"{last}{len(texts) - len(texts_shown)} more" if len(texts) > len(texts_shown) else ""
    return joint.join(texts_shown) + more
