"""Suppress log lines, warnings and progress bars, of libraries and of loradeploy's own work."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Final

_NOISY: Final = (
    "torch",
    "torch.onnx",
    "torch.export",
    "onnxscript",
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
)
# For libraries that set their log levels when they are imported.
_SETTINGS: Final = {"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
_NO_BARS: Final = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def quiet_process() -> None:
    """Show only loradeploy's messages, for the rest of a process that runs only loradeploy.

    Relevant problems of libraries arrive as exceptions. Progress bars of downloads stay on a
    terminal.
    """
    settings = _SETTINGS if sys.stderr.isatty() else _SETTINGS | _NO_BARS
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if logging.lastResort is not None:  # handles records of loggers without handlers
        logging.lastResort.addFilter(logging.Filter("loradeploy"))
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings, logs and progress bars of torch and other libraries in the context."""
    import transformers

    noisy = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in noisy]
    verbosity = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for logger in noisy:
        logger.setLevel(max(logger.level, logging.ERROR))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
        transformers.utils.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_loradeploy() -> Iterator[None]:
    """Suppress loradeploy's log lines below errors in the context, for internal work."""
    logger = logging.getLogger("loradeploy")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
