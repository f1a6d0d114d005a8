"""Suppress messages in onnxruntime's log that loradeploy reports itself."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Final

from loradeploy.printable import logger_of

logger = logger_of(__name__)

# onnxruntime's log severities. Its errors are also raised, and reported by loradeploy.
WARNINGS, ERRORS, FATAL = 2, 3, 4
UNSET: Final = -1


# The severity applies to the process: it is restored when no thread is inside `unlogged`.
_within: Final[list[None]] = []
_counting: Final = threading.Lock()


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Suppress onnxruntime's messages about provider libraries that cannot be loaded.

    Afterwards warnings are logged, the default: onnxruntime cannot return the previous severity.
    """
    import onnxruntime

    if logger.isEnabledFor(logging.DEBUG):
        yield
        return
    with _counting:
        if not _within:
            onnxruntime.set_default_logger_severity(FATAL)
        _within.append(None)
    try:
        yield
    finally:
        with _counting:
            _within.pop()
            if not _within:
                onnxruntime.set_default_logger_severity(WARNINGS)


def severity() -> int:
    """The log severity of a session: no warnings for every side input, and no repeated errors."""
    return ERRORS if logger.isEnabledFor(logging.DEBUG) else FATAL
