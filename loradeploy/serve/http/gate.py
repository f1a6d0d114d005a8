"""Checks before every request: host, key, rate, size and time; and the last error handler."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loradeploy.printable import logger_of
from loradeploy.serve.keys import ANYONE, ApiKey
from loradeploy.serve.problems import RequestError, problem_of, speaks_v2
from loradeploy.serve.service import Service

logger = logger_of(__name__)

# Seconds in which a client must send a request's body.
_BODY_TIMEOUT: Final = 30.0
# The status in metrics if the client disconnected before the response, which is not a failure.
_GONE: Final = 499
# Routes for monitoring, which need no key.
OPEN_PATHS: Final = frozenset({"/health", "/ready", "/v2/health/live", "/v2/health/ready"})
# Length of the JSON in a body of the Open Inference Protocol that is followed by tensors' bytes.
_JSON_LENGTH: Final = b"inference-header-content-length"
# Pages of other sites must not use the service, nor embed this page.
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
)


class _SlowClientError(Exception):
    """The client does not accept its response."""


class Gate:
    """The application with its checks. They store a request's key in its state."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request to the application, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Load balancers probe with HEAD, which the application's routes do not have.
        bodiless = scope["method"] == "HEAD"
        if bodiless:
            scope = {**scope, "method": "GET"}
        begun = gone = False

        async def noted_receive() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def limited_send(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._service.metrics.responded(_GONE if gone else message["status"])
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            elif bodiless:
                message = {**message, "body": b""}
            try:
                await asyncio.wait_for(send(message), self._service.limits.send_timeout)
            except asyncio.TimeoutError:
                raise _SlowClientError from None

        try:
            key = self._check(scope)
            scope.setdefault("state", {})["key"] = key
            body = await self._body(scope, noted_receive)
            body = _json_of(scope, body)
            await self._app(scope, _with_body(body, noted_receive), limited_send)
        except _SlowClientError:
            logger.info("a client did not accept its response in time")
        except Exception as error:
            if not begun:  # otherwise the application has logged and answered it
                await _answer(problem_of(error), scope["path"], limited_send)

    def _check(self, scope: Scope) -> ApiKey:
        """The key of a request.

        Raises:
            RequestError: a missing or unknown key, too many requests, or another refusal.
        """
        service = self._service
        if scope["path"] in OPEN_PATHS:
            return ANYONE
        headers = dict(scope["headers"])
        if service.keys is None:
            # Without a key, a page of another site could reach this service by a DNS name of its
            # own.
            if is_loopback(service.host) and not is_loopback(_host(headers.get(b"host", b""))):
                raise RequestError(421, "this service only answers on localhost")
            key = ANYONE
        else:
            key = service.keys.check(headers.get(b"authorization", b"").decode("latin-1"))
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            # A type that browsers send to other sites only after a preflight request. Other clients
            # of the protocol need not give one.
            if not (
                kind == b"application/json"
                or (
                    speaks_v2(scope["path"])
                    and kind in (b"", b"application/octet-stream")
                    and b"origin" not in headers
                )
            ):
                raise RequestError(415, "give Content-Type: application/json")
            if service.keys is not None:
                service.keys.count(key)
            if service.draining:
                raise RequestError(
                    503, "the service is shutting down", code="shutting_down", retry_after=5
                )
        return key

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Read the complete body, before anything else is done.

        Raises:
            RequestError: it is too long, or takes too long to arrive.
        """
        most = self._service.limits.max_request_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > most:
            raise _too_long(most)

        return await body_of(receive, most) or b""  # no response if the client disconnected


async def body_of(receive: Receive, most: int) -> bytes | None:
    """The complete body of a request; None if the client disconnected before its end.

    Raises:
        RequestError: it has more than `most` bytes, or takes too long to arrive.
    """

    async def read() -> bytes | None:
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > most:
                raise _too_long(most)
            more = message.get("more_body", False)
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), _BODY_TIMEOUT)
    except asyncio.TimeoutError:
        raise RequestError(408, "the request's body took too long to arrive") from None


def _too_long(most: int) -> RequestError:
    return RequestError(413, f"the request has more than {most:,} bytes")


def _with_body(body: bytes, receive: Receive) -> Receive:
    """A receive function that first returns `body`."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


def _json_of(scope: Scope, body: bytes) -> bytes:
    """The JSON of a body. The bytes after it are stored in the request's state, None without any.

    Raises:
        RequestError: the body is shorter than declared.
    """
    scope["state"]["tail"] = None
    if not speaks_v2(scope["path"]):
        return body
    headers = dict(scope["headers"])
    kept = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    scope["headers"] = [*kept, (b"content-type", b"application/json")]
    length = headers.get(_JSON_LENGTH)
    if length is None:
        return body
    if not length.isdigit() or int(length[:20]) > len(body):
        raise RequestError(400, f"{_JSON_LENGTH.decode()} is not the length of the body's JSON")
    scope["state"]["tail"] = body[int(length) :]
    return body[: int(length)]


async def _answer(problem: RequestError, path: str, send: Send) -> None:
    body = json.dumps(problem.body_at(path)).encode()
    headers = {"Content-Type": "application/json", **problem.headers}
    listed = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send(
        {
            "type": "http.response.start",
            "status": problem.status,
            "headers": [*listed, (b"content-length", str(len(body)).encode())],
        }
    )
    await send({"type": "http.response.body", "body": body})


def _host(header: bytes) -> str:
    """The host name in a Host header, without the port."""
    text = header.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether a host name or address is a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
