"""The signals that end a process: Ctrl-C, SIGTERM, and SIGHUP, when its terminal is closed."""

from __future__ import annotations

import signal
from typing import Final

_NAMES: Final = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


def ending_signals() -> list[signal.Signals]:
    """The signals to handle: without those that are ignored, as SIGHUP is by nohup.

    Nor those with a handler that is no Python function, which could not be restored.
    """
    known = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    return [n for n in known if signal.getsignal(n) not in (signal.SIG_IGN, None)]
