"""onnxruntime's log, while a line of ours says what it would say."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Final

from loradeploy.printable import logger_of

logger = logger_of(__name__)

# onnxruntime's log severities. Its errors are raised too, and are reported in a line of ours.
WARNINGS, ERRORS, FATAL = 2, 3, 4
UNSET: Final = -1


# The severity is the process's: it is given back once nobody is within `unlogged` any more.
_within: Final[list[None]] = []
_counting: Final = threading.Lock()


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Without what onnxruntime's own logger says of a provider's library that does not load.

    Afterwards it logs warnings, which is its default: it cannot be asked for the severity it had.
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
    """Of a session: else there is a warning for every side input, and every error comes twice."""
    return ERRORS if logger.isEnabledFor(logging.DEBUG) else FATAL
