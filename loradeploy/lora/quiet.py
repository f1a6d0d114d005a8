"""Keep what libraries say of themselves from the user."""

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
# As much for the libraries that set their own levels when they are imported.
_SETTINGS: Final = {"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
_NO_BARS: Final = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def quiet_process() -> None:
    """Let only loradeploy's own lines reach the user, for the rest of a process that is its own.

    What matters of what a library says comes as an exception, and is told in a line of ours. Bars
    of downloads stay where there is a terminal.
    """
    settings = _SETTINGS if sys.stderr.isatty() else _SETTINGS | _NO_BARS
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if logging.lastResort is not None:  # where loggers without a handler end
        logging.lastResort.addFilter(logging.Filter("loradeploy"))
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines and progress bars of torch, transformers and their like inside."""
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
