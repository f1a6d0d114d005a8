"""Keep what libraries say of themselves from the user."""

from __future__ import annotations

import contextlib
import logging
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines and progress bars of torch, transformers and their like inside."""
    import transformers

    noisy = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in noisy]
    verbosity = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for logger in noisy:
        logger.setLevel(logging.ERROR)
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
