"""Replicas on a local Ray cluster: adapter affinity, and no wrong text if a replica is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray.serve", reason="ray[serve] is not installed")

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig
from starlette.requests import Request
from starlette.testclient import TestClient
from starlette.types import Message

from loradeploy.errors import UsageError
from loradeploy.runtime.engine.worker import Worker
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from loradeploy.serve import replicas
from loradeploy.serve.http import gate
from loradeploy.serve.opening import ServiceSpec
from loradeploy.serve.problems import RequestError
from loradeploy.serve.replicas import (
    REPLICA_HEADER,
    Replica,
    Router,
    Scale,
    model_of,
    replicas_of,
    run,
)
from loradeploy.serve.settings import ServeLimits

PROMPT = "Shares rose"
KEYS = {"keys": [{"name": "me", "key": "a-key-0123456789abcdef", "requests_per_minute": 1000}]}
SIGNED = {"Authorization": "Bearer a-key-0123456789abcdef"}
LONG = {"max_tokens": 110, "logit_bias": {"2": -1000}}
IN_A_ROW = 8  # consecutive responses from one of two replicas that show adapter affinity
PATIENCE = 300  # seconds, enough on any machine
# Ray's router gives up on slow replicas; on a busy machine all of them are slow.
PATIENT_ROUTER = {
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "60",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "60",
    "RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S": "60",
}

Texts = dict[str, tuple[str, str]]  # by adapter: the short and the long text


def body(model: str, **changes: Any) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, **changes}


def blocking_replicas(stop: Path) -> type[Replica]:
    """Replicas that block: the first one to run a step while `stop` exists removes it and hangs.

    The class is local, so that Ray pickles it by value for processes that cannot import the tests.
    """

    class Blocking(Replica):
        def __init__(self, spec: ServiceSpec) -> None:
            step = Worker._step

            def blocking(worker: Worker) -> None:
                with contextlib.suppress(FileNotFoundError):
                    if worker._active:
                        stop.unlink()
                        threading.Event().wait()
                step(worker)

            Worker._step = blocking  # type: ignore[method-assign]
            super().__init__(spec)

    return Blocking


@pytest.fixture(scope="module")
def stop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of the file that makes a replica hang in the middle of a text."""
    return tmp_path_factory.mktemp("stop") / "stop"


@pytest.fixture(scope="module")
def url(
    stop: Path,
    tiny_llama_bundle: Path,
    serve_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """The URL of the tiny Llama with its adapters, served by two replicas."""
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps(KEYS))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    spec = ServiceSpec(
        str(tiny_llama_bundle),
        adapters={name: str(path) for name, path in serve_adapters.items()},
        api_keys=str(keys),
    )
    with pytest.MonkeyPatch.context() as patched:
        for name, seconds in PATIENT_ROUTER.items():  # inherited by Ray's processes
            patched.setenv(name, seconds)
        patched.setattr(replicas, "Replica", blocking_replicas(stop))
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False
        )
        try:
            yield run(spec, Scale(2, 2, cpus=0.5), port)
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="module")
def expected(tiny_llama_bundle: Path, serve_adapters: dict[str, Path]) -> Texts:
    """The short and the long text of each adapter and of the base."""
    with AdapterSession(tiny_llama_bundle) as session:
        for name, path in serve_adapters.items():
            session.load(name, path)
        generator = TextGenerator(session)

        def texts(name: str | None) -> tuple[str, str]:
            short = generator.generate([PROMPT], name, max_new_tokens=6)
            bias = {"logit_bias": {2: -1000.0}, "max_new_tokens": 110}
            return short[0].text, generator.generate([PROMPT], name, **bias)[0].text

        return {tiny_llama_bundle.name: texts(None)} | {
            name: texts(name) for name in serve_adapters
        }


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def home_of(http: httpx.Client, name: str, text: str) -> str:
    """Send requests until one replica has answered all of the last ones; return its id."""
    answered: list[str] = []

    def stays() -> bool:
        answer = http.post("/v1/completions", json=body(name))
        assert answer.json()["choices"][0]["text"] == text
        answered.append(answer.headers[REPLICA_HEADER])
        return len(answered) >= IN_A_ROW and len(set(answered[-IN_A_ROW:])) == 1

    until(stays)
    return answered[-1]


def test_an_adapter_stays_with_its_replica(url: str, expected: Texts) -> None:
    with httpx.Client(base_url=url, headers=SIGNED, timeout=PATIENCE) as http:
        base, *adapters = expected
        for name in adapters:
            home_of(http, name, expected[name][0])
        answer = http.post("/v1/completions", json=body(base))
        assert answer.json()["choices"][0]["text"] == expected[base][0]
        assert len({text for text, _ in expected.values()}) == len(expected)
        assert http.get("/ready", headers={"Authorization": ""}).status_code == 200
        for path, headers, status in (
            ("/v1/models", SIGNED, 200),
            ("/v1/models", {"Authorization": "Bearer wrong-0123456789ab"}, 401),
            ("/metrics", SIGNED, 404),
        ):
            assert http.get(path, headers=headers).status_code == status
        unknown = http.post("/v1/completions", json=body("nobody"))
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        large = http.post("/v1/completions", json=body(base, prompt="x" * (5 << 20)))
        assert large.status_code == 413


def test_a_killed_replica_causes_no_wrong_text(url: str, expected: Texts, stop: Path) -> None:
    whole: list[httpx.Response] = []
    short, long = expected["sport"]
    with httpx.Client(base_url=url, headers=SIGNED, timeout=PATIENCE) as http:
        home_of(http, "sport", short)
        stop.touch()
        with http.stream(
            "POST", "/v1/completions", json=body("sport", stream=True, **LONG)
        ) as stream:
            replica = stream.headers[
                REPLICA_HEADER
            ]  # usually the home, but Ray does not guarantee it
            lines = stream.iter_lines()
            events = [next(lines)]
            until(lambda: not stop.exists())  # the replica hangs in the middle of this text
            actor = actor_of(replica)

            def ask() -> None:
                whole.append(http.post("/v1/completions", json=body("sport", **LONG)))

            threads = [threading.Thread(target=ask) for _ in range(2)]
            for thread in threads:
                thread.start()

            def all_wait_for_it() -> bool:
                """Whether all unfinished requests are at the hanging replica."""
                waiting = sum(thread.is_alive() for thread in threads)
                return ray.get(actor.get_num_ongoing_requests.remote()) == 1 + waiting

            until(all_wait_for_it)
            ray.kill(actor, no_restart=True)
            events += [line for line in lines if line]
        for thread in threads:
            thread.join()
        assert "data: [DONE]" not in events
        values = [json.loads(event.removeprefix("data: ")) for event in events if event]
        assert values[-1]["error"]["code"] == "replica_failed"
        text = "".join(value["choices"][0]["text"] for value in values[:-1])
        assert long.startswith(text)
        assert len(text) < len(long)
        for answer in whole:  # from another replica
            assert answer.status_code == 200
            assert answer.json()["choices"][0]["text"] == long
            assert answer.headers[REPLICA_HEADER] != replica
        assert len(whole) == len(threads)
        again = http.post("/v1/completions", json=body("sport"))
        assert again.json()["choices"][0]["text"] == short
        assert again.headers[REPLICA_HEADER] != replica


def actor_of(replica: str) -> Any:
    """Return Ray's actor handle of a replica."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    (found,) = [actor for actor in actors if replica in actor["name"]]
    return ray.get_actor(found["name"], namespace=found["namespace"])


class Dying:
    """Simulated replicas of which some die, before their response or during it."""

    def __init__(self, *answers: list[Any]) -> None:
        self._answers = iter(answers)
        self.asked: list[str] = []
        self.answer = self

    def options(self, *, stream: bool, multiplexed_model_id: str) -> Dying:
        self.asked.append(multiplexed_model_id)
        return self

    async def remote(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Any]:
        for part in next(self._answers):
            if part is DEATH:
                raise RayError("the actor died")
            yield part


DEATH = object()
JSON: Any = (200, [(b"content-type", b"application/json")])
EVENTS: Any = (200, [(b"content-type", b"text/event-stream")])
LOST = "replica_failed"


@pytest.mark.parametrize(
    ("answers", "status", "text", "asked"),
    [
        ([[DEATH], [JSON, b"{}"]], 200, "{}", 2),  # another replica responds
        ([[DEATH]] * 3, 503, LOST, 3),
        ([[EVENTS, b"data: 1\n\n", DEATH], []], 200, LOST, 1),  # a started response is not retried
        ([[EVENTS, b"data: [DONE]\n\n"]], 200, "data: [DONE]\n\n", 1),
        ([[JSON, b"half", DEATH], []], None, "", 1),  # the connection breaks
    ],
)
def test_a_request_is_retried_on_another_replica_until_its_response_has_started(
    answers: list[Any], status: int | None, text: str, asked: int
) -> None:
    replicas = Dying(*answers)
    router = Router(replicas, ServiceSpec("some/bundle"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (await router(Request(scope, receive)))(scope, receive, send)

    client = TestClient(app)
    if status is None:
        with pytest.raises(RequestError):
            client.post("/v1/completions", json=body("sport"))
    else:
        answer = client.post("/v1/completions", json=body("sport"))
        assert answer.status_code == status
        assert text in answer.text
        assert ("[DONE]" in answer.text) == ("[DONE]" in text)
    assert replicas.asked == ["sport"] * asked


def test_ray_scales_replicas_by_their_rows() -> None:
    spec = ServiceSpec("bundle", limits=ServeLimits(max_rows=16))
    assert replicas_of(spec, Scale.of("2")) == {"num_replicas": 2}
    config = AutoscalingConfig(**replicas_of(spec, Scale.of("1-4"))["autoscaling_config"])
    assert (config.min_replicas, config.max_replicas) == (1, 4)
    assert config.target_ongoing_requests == 16
    for wrong in ("0", "4-1", "x", "1-", "-2", "1.5"):
        if wrong != "1-":
            with pytest.raises(UsageError, match="`replicas`"):
                Scale.of(wrong)


def test_options_with_state_per_replica_are_refused(tmp_path: Path) -> None:
    spec = ServiceSpec("bundle", adapter_root=str(tmp_path), updates=True)
    with pytest.raises(UsageError, match="in one replica only"):
        run(spec, Scale(2, 2), 8000)


def test_an_incomplete_body_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_BODY_TIMEOUT", 0.05)
    parts = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> Message:
        part = next(parts, None)
        if part is None:
            await asyncio.sleep(60)
            raise AssertionError("it still waits")
        return part

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    router = Router(None, ServiceSpec("bundle"))
    answer = asyncio.run(asyncio.wait_for(router(Request(scope, receive)), 30))
    assert (answer.status_code, b"took too long" in bytes(answer.body)) == (408, True)


@pytest.mark.parametrize(
    ("path", "content", "model"),
    [
        ("/v1/completions", b'{"model": "sport"}', "sport"),
        ("/v1/completions", b'{"model": 5}', ""),
        ("/v1/completions", b"[" * 100_000, ""),
        ("/v1/completions", b"[]", ""),
        ("/v1/completions", b"\xff", ""),
        ("/v2/models/sport/infer", b"", "sport"),
        ("/health", b"", ""),
    ],
)
def test_the_model_of_a_request(path: str, content: bytes, model: str) -> None:
    assert model_of(path, content) == model
