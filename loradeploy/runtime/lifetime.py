"""How long a session can be used, and where: until it is closed, in the process that opened it.

onnxruntime's threads do not live on in a forked process, where a run would wait for them forever;
and locks may be held there by threads that are no more.
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
    """Counts what uses a session. Safe from several threads."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._closed = False
        self._users: list[int] = []  # threads, once for each use
        self._changed = threading.Condition()

    @contextmanager
    def use(self) -> Iterator[None]:
        """The session stays open while the context lasts.

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
        """Refuse uses from now on, and wait for those that have begun.

        False where an earlier call did so already.

        Raises:
            UsageError: this thread is itself in the middle of one, or it is another process.
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
    """A method of a session that is refused once the session is closed, and in a forked process."""

    @wraps(method)
    def checked(self: Any, /, *given: _Given.args, **named: _Given.kwargs) -> _Result:
        with self._lifetime.use():
            return method(self, *given, **named)

    return checked
