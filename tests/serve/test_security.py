"""API keys, limits, secrets and the shutdown of a server."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from loradeploy.errors import (
    DataError,
    LoraDeployError,
    UsageError,
)
from loradeploy.serve.adapters.roots import DirectoryRoot
from loradeploy.serve.keys import ApiKey, KeyRing
from loradeploy.serve.problems import RequestError, problem_of
from loradeploy.serve.settings import ServeLimits
from tests.serve.answers import connection, until
from tests.serve.conftest import Running, serving

PROMPT = "Shares rose"
BASE = "bundle-llama"
ALL, NEWS, SLOW, ADMIN, PART = (
    f"{name}-0123456789abcdef" for name in ("all", "news", "slow", "admin", "part")
)
KEYS = [
    ApiKey("all", ALL),
    ApiKey("news", NEWS, frozenset({"headline"})),
    ApiKey("slow", SLOW, requests_per_minute=2),
    ApiKey("admin", ADMIN, admin=True),
    ApiKey("part", PART, frozenset({"headline", "mine"}), admin=True),
]
BODY: dict[str, Any] = {"model": BASE, "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
# Generates up to the last position of the tiny model.
LONG: dict[str, Any] = {
    **BODY,
    "max_tokens": 120,
    "logit_bias": {"2": -1000},  # the end token
}


@pytest.fixture(scope="module")
def guarded(
    tiny_llama_bundle: Path,
    serve_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """A server that requires API keys."""
    root = tmp_path_factory.mktemp("root")
    adapters = {name: serve_adapters[name] for name in ("headline", "sport")}
    with serving(
        tiny_llama_bundle, keys=KEYS, adapters=adapters, root=root, updates=True
    ) as running:
        yield running


def test_every_route_except_health_requires_a_key(guarded: Running) -> None:
    http = guarded.http()
    paths = http.get("/openapi.json", headers={"Authorization": f"Bearer {ALL}"}).json()["paths"]
    pages = ["/", "/page.js", "/page.css", "/openapi.json", "/nothing"]
    asked = [(path, method) for path, methods in paths.items() for method in methods]
    for path, method in [*asked, *((page, "get") for page in pages)]:
        answer = http.request(method, path)
        if path in ("/health", "/ready", "/v2/health/live", "/v2/health/ready"):
            assert answer.status_code == 200
            continue
        error = answer.json()["error"]
        assert answer.status_code == 401
        if path.startswith("/v2"):  # errors of this API are strings
            assert "give a valid API key" in error
        else:
            assert error["code"] == "invalid_api_key"
    for wrong in (f"Bearer {ALL}x", f"Bearer {ALL[:-1]}", "Bearer", f"Token {ALL}", "Basic !"):
        assert http.get("/v1/models", headers={"Authorization": wrong}).status_code == 401
    # Browsers show a login dialog.
    assert "Basic" in http.get("/").headers["www-authenticate"]
    assert http.get("/", auth=("", ALL)).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        guarded.client("wrong-0123456789abcdef").models.list()


def test_a_key_sees_and_uses_only_its_own_adapters(guarded: Running) -> None:
    client = guarded.client(NEWS)
    assert [model.id for model in client.models.list()] == ["headline"]
    assert client.completions.create(**{**BODY, "model": "headline"}).choices
    for model in ("sport", BASE):
        with pytest.raises(openai.NotFoundError) as refused:
            client.completions.create(**{**BODY, "model": model})
        assert "headline" not in str(refused.value)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**BODY, extra_body={"adapters": {"headline": 1.0}})
    with pytest.raises(openai.PermissionDeniedError):
        client.post("/load_lora_adapter", body={"lora_name": "x"}, cast_to=object)
    with pytest.raises(openai.NotFoundError, match="no adapter 'x'"):
        guarded.client(ADMIN).post("/load_lora_adapter", body={"lora_name": "x"}, cast_to=object)


def test_an_admin_key_for_some_adapters_cannot_change_others(
    guarded: Running, serve_adapters: dict[str, Path]
) -> None:
    root = guarded.service.catalog.root
    assert isinstance(root, DirectoryRoot)
    for name in ("mine", "others"):
        shutil.copytree(serve_adapters["topic"], root.path / name)
    http = guarded.http(headers={"Authorization": f"Bearer {PART}"})

    def post(verb: str, **body: str) -> int:
        return http.post(f"/v1/{verb}_lora_adapter", json=body).status_code

    assert post("load", lora_name="mine", lora_path="others") == 404
    assert post("load", lora_name="other", lora_path="mine") == 404
    assert post("unload", lora_name="sport") == 404
    assert post("load", lora_name="mine") == post("unload", lora_name="mine") == 200


def test_a_key_has_its_own_rate_limit(guarded: Running) -> None:
    client = guarded.client(SLOW)
    for _ in range(2):
        client.completions.create(**BODY)
    with pytest.raises(openai.RateLimitError, match="2 requests a minute") as refused:
        client.completions.create(**BODY)
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
    assert guarded.client(ALL).completions.create(**BODY).choices


def test_the_prefix_cache_is_not_shared_between_keys(guarded: Running) -> None:
    prompt = "The story begins like this: " * 4

    def cached(key: str) -> int:
        usage = guarded.client(key).completions.create(**{**BODY, "prompt": prompt}).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    assert cached(ALL) == 0
    assert cached(ALL) > 0
    assert cached(ADMIN) == 0


WRONG_FILES: dict[str, tuple[Any, str]] = {
    "none": ({"keys": []}, 'give {"keys"'),
    "other": ({"keys": [{"name": "a", "key": ALL}], "more": 1}, 'give {"keys"'),
    "short": ({"keys": [{"name": "a", "key": "short-secret"}]}, "key 1: key is not a text of 16"),
    "spaces": ({"keys": [{"name": "a", "key": "with spaces in between"}]}, "no spaces"),
    "name": ({"keys": [{"key": ALL}]}, "key 1: name is not"),
    "twice": ({"keys": [{"name": n, "key": ALL} for n in "ab"]}, "the same key"),
    "field": ({"keys": [{"name": "a", "key": ALL, "rate": 3}]}, "unknown field 'rate'"),
    "adapters": ({"keys": [{"name": "a", "key": ALL, "adapters": "x"}]}, "list of names"),
    "rate": ({"keys": [{"name": "a", "key": ALL, "requests_per_minute": 0}]}, "number above 0"),
    "admin": ({"keys": [{"name": "a", "key": ALL, "admin": 1}]}, "true or false"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_an_invalid_key_file_is_refused_without_showing_its_secrets(
    name: str, tmp_path: Path
) -> None:
    content, message = WRONG_FILES[name]
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="key") as refused:
        KeyRing.read(file)
    assert message in str(refused.value)
    assert not any(secret in str(refused.value) for secret in (ALL, "short-secret"))


def test_a_key_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    own = {"adapters": ["a"], "requests_per_minute": 3, "admin": True}
    file.write_text(json.dumps({"keys": [{"name": "n", "key": ALL, **own}]}))
    assert KeyRing.read(file).check(f"bearer {ALL}") == ApiKey("n", ALL, frozenset("a"), 3, True)


def test_a_rate_limit_recovers_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ApiKey("n", ALL, requests_per_minute=60)
    ring, now = KeyRing([key]), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for _ in range(60):
        ring.count(key)
    with pytest.raises(RequestError) as refused:
        ring.count(key)
    assert refused.value.headers == {"Retry-After": "1"}
    now[0] += 1
    ring.count(key)


# -- limits ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tiny_llama_bundle: Path) -> Iterator[Running]:
    """A server with one row and low limits."""
    with serving(
        tiny_llama_bundle,
        max_rows=1,
        max_waiting=1,
        max_tokens=120,
        max_n=2,
        max_request_bytes=4096,
        send_timeout=1.0,
        request_timeout=20.0,
    ) as running:
        yield running


def idle(running: Running) -> bool:
    assert running.service.engine is not None
    stats = running.service.engine.stats()
    return not (stats.running or stats.waiting)


@pytest.mark.usefixtures("slow_steps")
def test_one_request_too_many_is_answered_with_429(narrow: Running) -> None:
    http, body = narrow.http(), {**LONG, "max_tokens": 6}
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(http.post, "/v1/completions", json=body) for _ in range(8)]
        answers = [one.result() for one in asked]
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses[0] == 200
    assert statuses[-1] == 429
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    texts = {a.json()["choices"][0]["text"] for a in answers if a.status_code == 200}
    assert len(texts) == 1  # all accepted requests have the same text


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_cancels_its_request(narrow: Running, stream: bool) -> None:
    until(lambda: idle(narrow))
    assert narrow.service.engine is not None
    before = narrow.service.engine.stats().finished.get("cancelled", 0)
    client = connection(narrow, {**LONG, "stream": stream})
    until(lambda: not idle(narrow))
    client.close()
    until(lambda: idle(narrow))
    assert narrow.service.engine.stats().finished["cancelled"] == before + 1
    figures = narrow.http().get("/metrics").text  # not counted as a failure of the service
    assert 'http_responses_total{status="503"}' not in figures


def test_a_body_that_is_too_long_is_refused_before_it_is_read(narrow: Running) -> None:
    http = narrow.http()
    body = {**BODY, "prompt": "x" * 5000}
    assert http.post("/v1/completions", json=body).status_code == 413
    parts = (json.dumps(body).encode()[n : n + 100] for n in range(0, 5000, 100))
    headers = {"Content-Type": "application/json"}  # chunked, without a Content-Length
    assert http.post("/v1/completions", content=parts, headers=headers).status_code == 413


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({**BODY, "max_tokens": 121}, 400),
        ({**BODY, "n": 3, "temperature": 1}, 400),
        ({**BODY, "prompt": ["a", "b", "c"]}, 400),
        ({**BODY, "n": 2, "temperature": 1, "max_tokens": 2}, 400),  # there is one row
        ({**BODY, "prompt": ["a", "b"]}, 400),  # one request can wait
    ],
)
def test_a_request_beyond_a_limit_is_refused(
    narrow: Running, body: dict[str, Any], status: int
) -> None:
    assert narrow.http().post("/v1/completions", json=body).status_code == status


@pytest.mark.parametrize("name", ["request_timeout", "send_timeout", "drain_timeout"])
def test_an_infinite_timeout_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"`{name}` is inf: give at most"):
        ServeLimits(**{name: float("inf")})


@pytest.mark.usefixtures("slow_steps")
def test_a_request_that_takes_too_long_ends_with_504(tiny_llama_bundle: Path) -> None:
    with serving(tiny_llama_bundle, request_timeout=0.01) as running:
        with pytest.raises(openai.InternalServerError, match="took longer") as late:
            running.client().completions.create(**LONG)
        assert late.value.status_code == 504


def test_a_page_of_another_site_cannot_send_requests(narrow: Running) -> None:
    http = narrow.http()
    # By a host name that resolves to this machine (DNS rebinding).
    answer = http.get("/v1/models", headers={"Host": "evil.example:8000"})
    assert (answer.status_code, "localhost" in answer.text) == (421, True)
    assert http.get("/v1/models", headers={"Host": "localhost:8000"}).status_code == 200
    # By a form, which browsers send to other sites without a preflight request.
    content = json.dumps(BODY).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        sent = http.post("/v1/completions", content=content, headers={"Content-Type": kind})
        assert sent.status_code == 415
    assert "access-control-allow-origin" not in http.get("/v1/models").headers
    assert "default-src 'self'" in http.get("/").headers["content-security-policy"]


# -- secrets -----------------------------------------------------------------------------------

SECRET = "SECRETWORD"


def test_nothing_of_a_prompt_is_logged_or_counted(
    narrow: Running, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, "loradeploy")
    caplog.set_level(logging.DEBUG, "uvicorn")
    http = narrow.http()
    bodies: list[dict[str, Any]] = [
        {**BODY, "prompt": SECRET},
        {**BODY, "prompt": SECRET * 100},
        {**BODY, "prompt": {"text": SECRET}},
        {**BODY, "stop": SECRET, "stream": True},
        {**BODY, "prompt": SECRET, "logit_bias": {"300000": 1}},
    ]
    for body in bodies:
        http.post("/v1/completions", json=body)
    http.post("/v1/chat/completions", json={"model": BASE, "messages": [{"role": SECRET}]})
    figures = http.get("/metrics").text
    captured = capfd.readouterr()
    seen = [figures, caplog.text, captured.out, captured.err]
    assert not any(SECRET in text for text in seen)


def test_the_message_of_an_internal_error_is_neither_sent_nor_logged(
    narrow: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **options: Any) -> None:
        raise KeyError(SECRET)

    monkeypatch.setattr(narrow.service.engine, "submit", broken)
    answer = narrow.http().post("/v1/completions", json=BODY)
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "internal error")
    assert "KeyError at " in caplog.text
    assert SECRET not in caplog.text


def test_details_of_a_server_failure_are_not_sent_to_the_client() -> None:
    problem = problem_of(LoraDeployError("/srv/secret/bundle is broken"))
    assert (problem.status, "secret" in problem.message) == (500, False)


# -- the end -----------------------------------------------------------------------------------


def test_a_server_that_stops_completes_requests_in_progress(tiny_llama_bundle: Path) -> None:
    with serving(tiny_llama_bundle, max_tokens=120) as running:
        whole = running.client().completions.create(**LONG).choices[0].text
        done: list[str] = []

        def ask() -> None:
            done.append(running.client().completions.create(**LONG).choices[0].text)

        thread = threading.Thread(target=ask)
        thread.start()
        assert running.service.engine is not None
        stats = running.service.engine.stats
        until(lambda: stats().submitted == 2)
        running.server.stop()
        thread.join()
    assert done == [whole]


@pytest.mark.usefixtures("slow_steps")
def test_requests_cut_off_by_the_shutdown_do_not_get_an_incomplete_text(
    tiny_llama_bundle: Path,
) -> None:
    with serving(tiny_llama_bundle, max_tokens=120, drain_timeout=0.01) as running:
        client = connection(running, {**LONG, "stream": True})
        other = connection(running, LONG)
        assert running.service.engine is not None
        stats = running.service.engine.stats
        until(lambda: stats().submitted == 2)
        running.server.stop()
        parts = []
        for one in (client, other):
            content = b""
            while part := one.recv(65536):
                content += part
            one.close()
            parts.append(content.decode())
    streamed, whole = parts
    assert "shutting down" in streamed
    assert "[DONE]" not in streamed
    assert whole.startswith("HTTP/1.1 503")
