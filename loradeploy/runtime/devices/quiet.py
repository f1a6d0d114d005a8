"""onnxruntime's log, while a line of ours says what it would say."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Final

from loradeploy.printable import logger_of

logger = logger_of(__name__)

# onnxruntime's log severities. Its errors are raised too, and are reported in a line of ours.
WARNINGS, ERRORS, FATAL = 2, 3, 4
UNSET: Final = -1


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Without what onnxruntime's own logger says of a provider's library that does not load."""
    import onnxruntime

    if logger.isEnabledFor(logging.DEBUG):
        yield
        return
    onnxruntime.set_default_logger_severity(FATAL)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(WARNINGS)


def severity() -> int:
    """Of a session: else there is a warning for every side input, and every error comes twice."""
    return ERRORS if logger.isEnabledFor(logging.DEBUG) else FATAL
