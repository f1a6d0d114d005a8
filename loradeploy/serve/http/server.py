"""Serving an application by uvicorn, until a signal ends it."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from loradeploy.errors import UsageError
from loradeploy.printable import logger_of
from loradeploy.serve.http.app import create_app
from loradeploy.serve.http.gate import is_loopback
from loradeploy.serve.service import Service

logger = logger_of(__name__)

# Seconds beyond the drain in which the last answers are sent.
_LAST_WORDS = 5
# More connections than this are refused.
_CONNECTIONS = 1024
# Headers of a request, in bytes.
_HEADER_BYTES = 32 << 10


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free.

    Raises:
        UsageError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(512)
    except (OSError, OverflowError) as problem:
        made.close()
        reason = getattr(problem, "strerror", None) or problem
        raise UsageError(f"`host` {host}, `port` {port} cannot be listened on: {reason}") from None
    return made


def url_of(listening: socket.socket) -> str:
    """Where a client finds what listens on a socket."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves a service. The first signal drains it, and a second one ends it at once."""

    def __init__(self, service: Service) -> None:
        self._service = service
        if service.keys is None and not is_loopback(service.host):
            logger.warning("other machines can reach this service without an API key")
        super().__init__(
            uvicorn.Config(
                create_app(service),
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                limit_concurrency=_CONNECTIONS,
                timeout_graceful_shutdown=round(service.limits.drain_timeout) + _LAST_WORDS,
                h11_max_incomplete_event_size=_HEADER_BYTES,
                http="h11",
                ws="none",
            )
        )

    def serve_on(
        self, listening: socket.socket, on_ready: Callable[[], None] = lambda: None
    ) -> None:
        """Serve until `stop` or a signal, and close the service. `on_ready`: called at the start.

        It returns once the requests that there were have ended, or had the time to.
        """
        self._service.start()
        try:
            on_ready()
            self.run(sockets=[listening])
        finally:
            self._service.close()
            listening.close()

    def stop(self) -> None:
        """Take no more requests, and end when those that there are have ended."""
        self._service.draining = True
        threading.Thread(target=self._service.drain, name="loradeploy-drain", daemon=True).start()
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that was obeyed is not raised once more at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; end at once at the second."""
        if self.should_exit:
            self.force_exit = True
        else:
            self.stop()
