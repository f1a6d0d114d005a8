"""The lifetime of a session: until it is closed, and only in the process that opened it.

ONNX Runtime's threads do not exist in a forked process, where a run would wait for them forever.
Locks may also be held there by threads that do not exist.
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
_CLOSED: Final = "this session is closed: open another one with AdapterSession(bundle)"


class Lifetime:
    """Counts the running uses of a session. Thread-safe."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._closed = False
        self._users: list[int] = []  # thread ids, one for each use
        self._changed = threading.Condition()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Keep the session open during the context.

        Raises:
            UsageError: it is closed, or was opened in another process.
        """
        self._check_process()
        thread = threading.get_ident()
        with self._changed:
            if self._closed:
                raise UsageError(_CLOSED)
            self._users.append(thread)
        try:
            yield
        finally:
            with self._changed:
                self._users.remove(thread)
                self._changed.notify_all()

    def end(self) -> bool:
        """Refuse later uses, and wait for the running ones. Return False if this was done already.

        Raises:
            UsageError: this thread is in the middle of a use, or this is another process.
        """
        self._check_process()
        with self._changed:
            if threading.get_ident() in self._users:
                raise UsageError(
                    "this thread is in the middle of a run: close the session after it"
                )
            first, self._closed = not self._closed, True
            self._changed.wait_for(lambda: not self._users)
        return first

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise UsageError(
                "this session was opened in another process, before a fork: open one in each"
                " process, after it began"
            )


def while_open(
    method: Callable[Concatenate[Any, _Given], _Result],
) -> Callable[Concatenate[Any, _Given], _Result]:
    """Decorator: refuse a session's method after the session is closed, and in a forked process."""

    @wraps(method)
    def checked(self: Any, /, *given: _Given.args, **named: _Given.kwargs) -> _Result:
        with self._lifetime.use():
            return method(self, *given, **named)

    return checked
