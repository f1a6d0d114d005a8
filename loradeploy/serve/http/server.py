"""Serve an application with uvicorn, until a signal ends it."""

from __future__ import annotations

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
from loradeploy.signals import handling_endings

logger = logger_of(__name__)

# Additional seconds after the drain timeout for sending the last responses.
_LAST_WORDS = 5
_LAST_PORT = 65535
# Maximum number of connections.
_CONNECTIONS = 1024
# Maximum size of a request's headers in bytes.
_HEADER_BYTES = 32 << 10


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on `host` and `port`; port 0 chooses a free one.

    Raises:
        UsageError: it cannot listen there.
    """
    if not 0 <= port <= _LAST_PORT:
        raise UsageError(f"`port` is {port}: give 0 (any) to {_LAST_PORT}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(512)
    except OSError as problem:
        made.close()
        reason = problem.strerror or problem
        raise UsageError(f"`host` {host}, `port` {port} cannot be listened on: {reason}") from None
    return made


def url_of(listening: socket.socket) -> str:
    """The URL at which clients reach a listening socket."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Runs a service. The first signal drains it, and a second one ends it immediately."""

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

    def serve_on(self, listening: socket.socket, on_ready: Callable[[], None]) -> None:
        """Serve until `stop` or a signal, then close the service. `on_ready`: called at the start.

        Returns when the running requests have ended, or the drain timeout is over.
        """
        self._service.start()
        try:
            on_ready()
            self.run(sockets=[listening])
        finally:
            self._service.close()
            listening.close()

    def stop(self) -> None:
        """Accept no more requests, and stop when the running ones have ended."""
        self._service.draining = True
        threading.Thread(target=self._service.drain, name="loradeploy-drain", daemon=True).start()
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Like uvicorn's, but a handled signal is not raised again at the end."""
        with handling_endings(self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; stop immediately at the second."""
        if self.should_exit:
            self.force_exit = True
        else:
            self.stop()
