"""The lifetime of a session: until it is closed, and only in the process that opened it.

ONNX Runtime's threads do not exist in a forked process, where a run would wait for them forever.
Locks may also be held there by threads that do not exist.

Ctrl-C can interrupt the main thread in any Python code, in a `finally` too, but not a method of a
built-in type:

- A use is removed from a dict or a set, first in the `finally`. The notification after it may not
  happen, so waiters look again. An end of several calls is called again if it is interrupted, and a
  second call has no further effect.
- A lock is acquired itself: a Condition in a `with` is Python code, which may keep it.
- A generator that is a context may end only with the traceback, so its thread must not wait for it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from loradeploy.errors import UsageError

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
_AGAIN: Final = 0.5  # seconds until a waiter looks again, in case a notification was interrupted
_CLOSED: Final = "this session is closed: open another one with AdapterSession(bundle)"


class Lifetime:
    """Counts the running uses of a session. Thread-safe."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._closed = False
        self._uses: dict[object, int] = {}  # the thread of each
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Keep the session open during the context.

        Raises:
            UsageError: it is closed, or was opened in another process.
        """
        self._check_process()
        use = object()
        try:
            with self._lock:
                if self._closed:
                    raise UsageError(_CLOSED)
                self._uses[use] = threading.get_ident()
            yield
        finally:
            self._uses.pop(use, None)
            with self._lock:
                self._changed.notify_all()

    def end(self) -> bool:
        """Refuse later uses, and wait for the running ones. Return False if this was done already.

        Raises:
            UsageError: this thread is in the middle of a use, or this is another process.
        """
        self._check_process()
        with self._lock:
            if threading.get_ident() in self._uses.values():
                raise UsageError(
                    "this thread is in the middle of a run: close the session after it"
                )
            first, self._closed = not self._closed, True
            wait_until(self._changed, lambda: not self._uses)
        return first

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise UsageError(
                "this session was opened in another process, before a fork: open one in each"
                " process, after it began"
            )


def wait_until(changed: threading.Condition, ended: Callable[[], bool]) -> None:
    """Wait for `ended` to be true. The caller holds the lock of `changed`."""
    while not changed.wait_for(ended, _AGAIN):
        pass


def while_open(
    method: Callable[Concatenate[Any, _Given], _Result],
) -> Callable[Concatenate[Any, _Given], _Result]:
    """Decorator: refuse a session's method after the session is closed, and in a forked process."""

    @wraps(method)
    def checked(self: Any, /, *given: _Given.args, **named: _Given.kwargs) -> _Result:
        with self._lifetime.use():
            return method(self, *given, **named)

    return checked
