"""The signals that end a process: Ctrl-C, SIGTERM, and SIGHUP, when its terminal is closed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_NAMES: Final = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


def ending_signals() -> list[signal.Signals]:
    """The signals to handle: without those that are ignored, as SIGHUP is by nohup.

    Nor those with a handler that is no Python function, which could not be restored.
    """
    known = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return [n for n in known if signal.getsignal(n) not in (signal.SIG_IGN, None)]


@contextmanager
def handling_endings(handle: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Inside the context, `handle` handles the signals that end a process.

    Python delivers signals only to its main thread: in another thread the context has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
