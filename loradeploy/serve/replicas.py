"""A service with several replicas, on Ray Serve.

A router receives requests and forwards each to a replica that has its adapter already, if there is
one (Ray's model multiplexing). A replica is a complete service in a separate process; the router
forwards requests and responses unchanged.

If a replica dies, its requests are given to another one, unless a part of the response was sent.
Then the response is cut off, or in an event stream ends with an error instead of [DONE].
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message

from loradeploy.errors import UsageError, first_line
from loradeploy.paths import resolved
from loradeploy.printable import logger_of
from loradeploy.runtime.devices.table import CUDA
from loradeploy.serve.http.app import create_app
from loradeploy.serve.http.gate import OPEN_PATHS, body_of
from loradeploy.serve.keys import KeyRing
from loradeploy.serve.opening import ServiceSpec, open_service
from loradeploy.serve.problems import RequestError
from loradeploy.signals import handling_endings

logger = logger_of(__name__)

APPLICATION: Final = "loradeploy"
# The header that names the replica that answered.
REPLICA_HEADER: Final = "x-loradeploy-replica"
# How often a request is sent to replicas.
_ATTEMPTS: Final = 3
# Maximum adapters per replica that the router keeps track of; a replica may have more.
_MOST_MODELS: Final = 256
# Status and headers of a response, or a part of its body.
_Part = tuple[int, list[tuple[bytes, bytes]]] | bytes


@dataclass(frozen=True)
class Scale:
    """The number of replicas, from `least` to `most`, each with `cpus` processors.

    Raises:
        UsageError: not valid numbers.
    """

    least: int = 1
    most: int = 1
    cpus: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise UsageError(f"`replicas` is {self.least}-{self.most}: give 1 or more, as 2 or 1-4")

    @classmethod
    def of(cls, text: str, cpus: float = 1.0) -> Scale:
        """The numbers in "N" or "LEAST-MOST", with `cpus` processors each.

        Raises:
            UsageError: `text` has another form.
        """
        least, _, most = text.partition("-")
        if not (least.isdecimal() and (most or least).isdecimal()):
            raise UsageError(f"`replicas` is {text!a}: give 1 or more, as 2 or 1-4")
        return cls(int(least), int(most or least), cpus)


class Replica:
    """The service in a separate process."""

    def __init__(self, spec: ServiceSpec) -> None:
        keys = None if spec.api_keys is None else KeyRing.read(spec.api_keys).without_rates()
        self._service = open_service(spec, keys)
        self._service.start()
        self._app = create_app(self._service)
        self._name = serve.get_replica_context().replica_id.unique_id

    @serve.multiplexed(  # type: ignore[untyped-decorator]
        max_num_models_per_replica=_MOST_MODELS
    )
    async def _has(self, model: str) -> str:
        """Tell the router that this replica has the adapter `model`."""
        return model

    async def answer(self, scope: Mapping[str, Any], body: bytes) -> AsyncIterator[_Part]:
        """Yield the service's response to a request: status and headers, then parts of its body.

        The request ends if the caller stops reading.
        """
        parts: asyncio.Queue[tuple[int, list[tuple[bytes, bytes]]] | bytes | None] = asyncio.Queue(
            8
        )
        gone = asyncio.Event()
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                model = serve.get_multiplexed_model_id()
                if model and message["status"] < 400:
                    await self._has(model)  # unknown names must not use up the limit
                named = (REPLICA_HEADER.encode(), self._name.encode())
                await parts.put((message["status"], [*message.get("headers", ()), named]))
            elif message.get("body"):
                await parts.put(message["body"])

        async def run() -> None:
            whole = {
                "type": "http",
                "asgi": {"version": "3.0"},
                "http_version": "1.1",
                "scheme": "http",
                "root_path": "",
                "client": None,
                "server": None,
                "state": {},
                **scope,
            }
            try:
                await self._app(whole, receive, send)
            finally:
                await parts.put(None)

        task = asyncio.ensure_future(run())
        try:
            while (part := await parts.get()) is not None:
                yield part
            await task
        finally:
            gone.set()
            if not task.done():
                task.cancel()

    def check_health(self) -> None:
        """Raise RuntimeError if Ray must replace this replica."""
        engine = self._service.engine
        if engine is not None and not engine.alive:
            raise RuntimeError("the engine has failed")

    def __del__(self) -> None:
        service = getattr(self, "_service", None)
        if service is not None:
            service.close()


class Router:
    """Receives the clients' requests, checks keys and rates, and forwards to replicas."""

    def __init__(self, replicas: Any, spec: ServiceSpec) -> None:
        self._replicas = replicas
        self._limits = spec.limits
        self._base = resolved(spec.bundle).name
        self._keys = None if spec.api_keys is None else KeyRing.read(spec.api_keys)

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        try:
            return await self._answer(request)
        except RequestError as problem:
            body = problem.body_at(request.url.path)
            return JSONResponse(body, problem.status, headers=problem.headers)

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        if self._keys is not None and path not in OPEN_PATHS:
            key = self._keys.check(request.headers.get("authorization"))
            if request.method == "POST":
                self._keys.count(key)
        if path == "/metrics":
            raise RequestError(404, "each replica has its own metrics: see those of Ray Serve")
        body = await body_of(request.receive, self._limits.max_request_bytes)
        if body is None:
            return Response(status_code=499)
        scope = {
            "method": request.method,
            "path": request.scope["path"],
            "raw_path": request.scope.get("raw_path", path.encode()),
            "query_string": request.scope.get("query_string", b""),
            "headers": [(bytes(name), bytes(value)) for name, value in request.scope["headers"]],
        }
        model = model_of(path, body)
        model = "" if model == self._base else model
        for attempt in range(1, _ATTEMPTS + 1):
            handle = self._replicas.options(stream=True, multiplexed_model_id=model)
            parts = handle.answer.remote(scope, body)
            try:
                status, headers = await anext(parts)
            except RayError as problem:
                logger.warning("a replica failed: %s", first_line(problem))
                if attempt == _ATTEMPTS:
                    raise RequestError(
                        503, "the replica failed", code="replica_failed", retry_after=5
                    ) from None
                continue
            found = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
            events = found.get("content-type", "").startswith("text/event-stream")
            return StreamingResponse(_rest(parts, events=events), status, found)
        raise AssertionError("unreachable")


async def _rest(parts: Any, *, events: bool) -> AsyncIterator[bytes]:
    """Yield the parts of a response; an error if the replica fails before the end."""
    try:
        async for part in parts:
            yield part
    except RayError as problem:
        logger.warning("a replica failed: %s", first_line(problem))
        error = RequestError(503, "the replica failed", code="replica_failed")
        if not events:
            raise error from None  # closes the connection before the body is complete
        yield f"data: {json.dumps(error.body)}\n\n".encode()


def model_of(path: str, body: bytes) -> str:
    """The model that a request names; "" if it names none."""
    parts = path.split("/")
    if parts[1:3] == ["v2", "models"] and len(parts) > 3:
        return parts[3]
    try:
        model = json.loads(body).get("model", "")
    except (ValueError, AttributeError, RecursionError):
        return ""
    return model if isinstance(model, str) and len(model) <= 128 else ""


def application(spec: ServiceSpec, scale: Scale) -> Any:
    """The application for `ray.serve.run`."""
    limits = spec.limits
    options: dict[str, Any] = {
        "ray_actor_options": {
            "num_cpus": scale.cpus,
            "num_gpus": 1 if spec.provider == CUDA else 0,
        },
        # The service itself responds with 429 if there are too many.
        "max_ongoing_requests": limits.max_rows + limits.max_waiting + 64,
        "graceful_shutdown_timeout_s": limits.drain_timeout,
        **replicas_of(spec, scale),
    }
    replicas = serve.deployment(Replica).options(name="Replica", **options)
    router = serve.deployment(Router).options(
        name="Router",
        max_ongoing_requests=1024,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=limits.drain_timeout,
    )
    threads = spec.threads or math.ceil(scale.cpus)  # replicas on a node share its processors
    return router.bind(replicas.bind(replace(spec, threads=threads)), spec)


def replicas_of(spec: ServiceSpec, scale: Scale) -> dict[str, Any]:
    """Ray's options for the number of replicas: one more is started when all rows are in use."""
    if scale.least == scale.most:
        return {"num_replicas": scale.least}
    return {
        "autoscaling_config": {
            "min_replicas": scale.least,
            "max_replicas": scale.most,
            "target_ongoing_requests": spec.limits.max_rows,
        }
    }


def run(spec: ServiceSpec, scale: Scale, port: int) -> str:
    """Start the application on the Ray cluster of this machine or of RAY_ADDRESS; return its URL.

    Raises:
        UsageError: an option that would affect only one replica, or an invalid port.
    """
    if spec.updates:
        raise UsageError(
            "`allow_adapter_updates` would load adapters in one replica only: leave it out, each"
            " replica finds adapters in `adapter_root`"
        )
    if port == 0:
        raise UsageError("`port` is 0: give a port number for Ray Serve")
    spec = replace(spec, bundle=str(resolved(spec.bundle)))
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": spec.host, "port": port})
    serve.run(application(spec, scale), name=APPLICATION, route_prefix="/")
    return f"http://{spec.host}:{port}"


def wait_for_signal() -> None:
    """Wait for a signal to end, then shut down after running requests have ended."""
    ended = threading.Event()
    try:
        with handling_endings(lambda *_: ended.set()):
            ended.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
