"""`loradeploy serve`: the effect of its flags, its process, and user errors."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from loradeploy.errors import LoraDeployError, UsageError
from loradeploy.runtime.engine.statistics import EngineStatistics
from loradeploy.runtime.session import AdapterSession
from loradeploy.serve.http.app import create_app
from loradeploy.serve.http.server import Server
from loradeploy.serve.service import Service
from loradeploy.serve.settings import ServeLimits
from tests.cli.calling import call, exit_status

KEY = "a-key-0123456789abcdef"

Seen = dict[str, Any]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The settings of the server at the moment it would start to listen."""
    found: Seen = {}

    def serve_on(self: Server, listening: socket.socket, on_ready: Callable[[], None]) -> None:
        service = self._service
        found["address"] = listening.getsockname()[:2]
        found["limits"] = vars(service.limits)
        root = service.catalog.root
        found["root"] = getattr(root, "path", getattr(root, "url", None))
        cache = getattr(root, "_fetched", None)
        found["cache"] = getattr(cache, "directory", None), getattr(cache, "_max_bytes", None)
        found["updates"] = service.updates
        found["threads"] = service.session._session.get_session_options().intra_op_num_threads
        found["keys"] = service.keys and service.keys.check(f"Bearer {KEY}").name
        found["adapters"] = sorted(service.session.adapters)
        found["budget"] = service.session._bank._memory.budget
        assert service.engine is not None
        found["rows"] = service.engine.stats().slots
        on_ready()
        listening.close()
        service.close()

    monkeypatch.setattr(Server, "serve_on", serve_on)
    return found


# Flags with a value, the setting that they change, and its value.
FLAGS: list[tuple[list[str], Callable[[Seen], Any], Any]] = [
    (["--host", "127.0.0.2"], lambda s: s["address"][0], "127.0.0.2"),
    (["--adapter", "news={adapter}"], lambda s: s["adapters"], ["news"]),
    (["--adapter", "{adapter}"], lambda s: s["adapters"], ["headline"]),
    (["--adapter-root", "{root}"], lambda s: s["root"].name, "root"),
    (["--adapter-root", "memory://adapters"], lambda s: s["root"], "memory://adapters"),
    (
        ["--adapter-root", "memory://adapters", "--adapter-cache", "{root}/cache"],
        lambda s: s["cache"][0].name,
        "cache",
    ),
    (
        ["--adapter-root", "memory://adapters", "--max-cache-bytes", "3"],
        lambda s: s["cache"][1],
        3,
    ),
    (["--adapter-root", "{root}", "--allow-adapter-updates"], lambda s: s["updates"], True),
    (["--adapter-memory", "3"], lambda s: s["budget"], 3 << 20),
    (["--api-keys", "{keys}"], lambda s: s["keys"], "me"),
    (["--threads", "3"], lambda s: s["threads"], 3),
    (["--max-rows", "3"], lambda s: s["rows"], 3),
    (["--max-waiting", "3"], lambda s: s["limits"]["max_waiting"], 3),
    (["--max-tokens", "3"], lambda s: s["limits"]["max_tokens"], 3),
    (["--max-n", "3"], lambda s: s["limits"]["max_n"], 3),
    (["--max-inputs", "3"], lambda s: s["limits"]["max_inputs"], 3),
    (["--max-images", "3"], lambda s: s["limits"]["max_images"], 3),
    (["--max-image-pixels", "3"], lambda s: s["limits"]["max_image_pixels"], 3),
    (["--max-request-bytes", "3"], lambda s: s["limits"]["max_request_bytes"], 3),
    (["--max-adapter-bytes", "3"], lambda s: s["limits"]["max_adapter_bytes"], 3),
    (["--request-timeout", "3"], lambda s: s["limits"]["request_timeout"], 3.0),
    (["--send-timeout", "3"], lambda s: s["limits"]["send_timeout"], 3.0),
    (["--drain-timeout", "3"], lambda s: s["limits"]["drain_timeout"], 3.0),
    (["--batch-delay", "3"], lambda s: s["limits"]["batch_delay"], 3.0),
]


def test_every_flag_changes_what_is_served(
    seen: Seen,
    tiny_llama_bundle: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [{"name": "me", "key": KEY}]}))
    places = {"adapter": root / "headline", "root": root, "keys": keys}
    line = ["serve", str(tiny_llama_bundle), "--port", "0"]
    call(*line)
    plain = dict(seen)
    for flags, look, expected in FLAGS:
        call(*line, *(flag.format(**places) for flag in flags))
        assert look(seen) == expected, flags
        if "--allow" not in flags[-1]:
            assert repr(seen) != repr({**plain, "address": seen["address"]}) or flags[0] == "--host"
    assert plain["address"][0] == "127.0.0.1"
    monkeypatch.setattr("loradeploy.serve.opening.cores", lambda root: 1.5)  # a container's limit
    call(*line)
    assert seen["threads"] == 1


@pytest.mark.parametrize(
    ("flags", "option", "value"),
    [
        ([], "capture_graphs", False),
        (["--capture-graphs"], "capture_graphs", True),
        (["--require-certificate"], "require_certificate", True),
        (["--operator", "lora_add.so"], "operator", "lora_add.so"),
    ],
    ids=["none", "capture", "certificate", "operator"],
)
def test_a_flag_reaches_the_session(
    flags: list[str], option: str, value: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*given: Any, **options: Any) -> AdapterSession:
        assert options[option] == value
        raise LoraDeployError("enough was seen")

    monkeypatch.setattr("loradeploy.serve.opening.AdapterSession", opened)
    with pytest.raises(LoraDeployError, match="enough was seen"):
        call("serve", "bundle", "--port", "0", *flags)


def test_flags_reach_the_sessions_of_both_parts_of_a_vision_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, dict[str, Any]] = {}

    def opened(bundle: str, providers: list[str], **options: Any) -> None:
        given[bundle] = {"providers": providers, **options}

    def vision(*_: Any) -> None:
        raise LoraDeployError("enough was seen")

    monkeypatch.setattr("loradeploy.serve.opening.AdapterSession", opened)
    monkeypatch.setattr("loradeploy.serve.opening.Vision", vision)
    flags = ("--adapter-memory", "3", "--require-certificate", "--threads", "2")
    with pytest.raises(LoraDeployError, match="enough was seen"):
        call("serve", "decoder", "--vision", "tower", "--port", "0", *flags)
    for options in given.values():
        assert options["host_budget"] == 3 << 20
        assert options["require_certificate"] is True
        assert options["session_options"].intra_op_num_threads == 2
    assert given.keys() == {"decoder", "tower"}
    assert given["decoder"]["providers"] == given["tower"]["providers"]


def test_the_demo_opens_its_web_page(
    seen: Seen, tiny_llama_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="run `make demo`"):
        call("serve", "--demo", "--port", "0")
    (tmp_path / "build" / "demo").mkdir(parents=True)
    (tmp_path / "build" / "demo" / "bundle").symlink_to(tiny_llama_bundle)
    call("serve", "--demo", "--port", "0")
    host, port = seen["address"]
    assert opened == [f"http://{host}:{port}"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give the BUNDLE to serve"),
        (["{bundle}", "--allow-adapter-updates"], "give --adapter-root"),
        (
            ["{bundle}", "--adapter-root", "nothing"],
            "give a directory of adapters as --adapter-root",
        ),
        (["{bundle}", "--adapter-root", "zzz://x"], "not a URL that fsspec opens"),
        (["{bundle}", "--adapter-root", "zip://x::memory://y"], "not a chain of them"),
        (["{bundle}", "--adapter-cache", "x"], "give --adapter-root the URL"),
        (["{bundle}", "--threads", "0"], "--threads is 0"),
        (["{bundle}", "--replicas", "2"], "--replicas: give --ray"),
        (["{bundle}", "--api-keys", "nothing.json"], "nothing.json"),
        (["{bundle}", "--max-tokens", "0"], "--max-tokens is 0"),
        (["{bundle}", "--adapter-memory", "0"], "--adapter-memory is 0 MiB"),
        (["{bundle}", "--port", "{taken}"], "cannot be listened on: Address already in use"),
        (["{bundle}", "--port", "70000"], "--port is 70000: give 0 (any) to 65535"),
        (["{bundle}", "--require-certificate"], "certificate"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str], message: str, tiny_llama_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = {"bundle": tiny_llama_bundle, "taken": taken.getsockname()[1]}
        # If a mistake were not detected, the invalid port would end the command.
        line = ["serve", *(flag.format(**given) for flag in flags)]
        status = exit_status(*(line if "--port" in line else [*line, "--port", "0"]))
    (text,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert text.startswith("Error: ")
    assert message in text


@pytest.mark.parametrize(("flags", "scale"), [([], "1"), (["--replicas", "1-3"], "1-3")])
def test_replicas_are_run_by_ray(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    scale: str,
) -> None:
    asked: list[Any] = []

    class OnRay:
        Scale = type("Scale", (), {"of": staticmethod(lambda text, cpus: (text, cpus))})
        wait_for_signal = staticmethod(lambda: asked.append("waited"))

        @staticmethod
        def run(spec: Any, replicas: tuple[str, float], port: int) -> str:
            asked.extend([spec.bundle, spec.limits.max_rows, replicas, port])
            return "http://127.0.0.1:9"

    monkeypatch.setitem(sys.modules, "loradeploy.serve.replicas", OnRay)
    line = ["serve", "some", "--ray", "--port", "9", "--max-rows", "3", "--threads", "2", *flags]
    call(*line)
    assert asked == ["some", 3, (scale, 2.0), 9, "waited"]
    monkeypatch.setitem(sys.modules, "loradeploy.serve.replicas", None)
    capsys.readouterr()
    with pytest.raises(UsageError, match="pip install 'loradeploy"):
        call(*line)


def test_sigterm_ends_the_server_after_requests_in_progress(certified_bundle: Path) -> None:
    command = [sys.executable, "-m", "loradeploy", "serve", str(certified_bundle), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--json", "--require-certificate"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        lines = []
        while not lines or not lines[-1].startswith("}"):
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()[1]
        result = json.loads("".join(lines))
        assert list(result["adapters"]) == ["one"]
        body = {"model": "one", "prompt": "The", "temperature": 0, "max_tokens": 120}
        body["logit_bias"] = {"2": -1000}  # the end token
        whole = httpx.post(f"{result['url']}/v1/completions", json=body, timeout=60).json()
        host = result["url"].removeprefix("http://")
        asked = http.client.HTTPConnection(host, timeout=60)
        headers = {"Content-Type": "application/json"}
        content = json.dumps({**body, "stream": True})
        asked.request("POST", "/v1/completions", content, headers)
        answer = asked.getresponse()  # the stream has started
        process.send_signal(signal.SIGTERM)
        streamed = answer.read().decode()
        asked.close()
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    events = [json.loads(part[6:]) for part in streamed.split("\n\n") if part.startswith("data: {")]
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == whole["choices"][0]["text"]
    assert streamed.endswith("data: [DONE]\n\n")
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.usefixtures("slow_steps")
def test_a_client_that_reads_nothing_loses_its_rows(
    tiny_llama_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loradeploy.serve")
    body = {"model": "bundle-llama", "prompt": "a", "stream": True}
    content = json.dumps({**body, "logit_bias": {"2": -1000}}).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "http_version": "1.1",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }

    async def use(service: Service) -> EngineStatistics:
        given = [{"type": "http.request", "body": content}]

        async def receive() -> Any:
            return given.pop() if given else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()  # the client does not read: its buffer is full

        assert service.engine is not None
        await create_app(service)(scope, receive, send)
        await asyncio.to_thread(service.engine.drain)
        return service.engine.stats()

    session = AdapterSession(tiny_llama_bundle)
    service = Service(session, limits=ServeLimits(send_timeout=0.05))
    service.start()
    try:
        stats = asyncio.run(use(service))
    finally:
        service.close()
    assert stats.finished == {"cancelled": 1}
    assert "did not accept its response" in caplog.text


def test_a_limit_must_be_a_number_above_0() -> None:
    for wrong in (0, -1, True, "3", float("nan")):
        with pytest.raises(LoraDeployError, match="`max_rows` is"):
            ServeLimits(max_rows=wrong)  # type: ignore[arg-type]
