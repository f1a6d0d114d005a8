"""The commands and programs of docs/serving.md work with the server that it starts."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import httpx
import pytest

from loradeploy.cli.main import VERBS
from loradeploy.serve.http.server import Server
from loradeploy.serve.keys import KeyRing
from loradeploy.serve.settings import ServeLimits
from tests.cli.calling import call, command
from tests.conftest import ROOT
from tests.serve.conftest import Running, serving

DOCUMENT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
URL = "http://127.0.0.1:8000"
BLOCKS = re.findall(r"```(console|python|json)\n(.*?)```", DOCUMENT, re.DOTALL)
COMMANDS = [
    line.removeprefix("$ ")
    for kind, text in BLOCKS
    if kind == "console"
    for line in text.splitlines()
]


def blocks(kind: str) -> list[str]:
    return [text for found, text in BLOCKS if found == kind]


@pytest.fixture(scope="module")
def desk(
    tiny_llama_bundle: Path,
    serve_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A directory with the files that the page mentions."""
    place = tmp_path_factory.mktemp("desk")
    shutil.copytree(tiny_llama_bundle, place / "bundle")
    for name in ("headline", "sport"):
        shutil.copytree(serve_adapters[name], place / "adapters" / name)
    (place / "keys.json").write_text(*blocks("json"))
    return place


@pytest.fixture(scope="module")
def documented(desk: Path) -> Iterator[Running]:
    with serving(desk / "bundle", root=desk / "adapters", updates=True) as running:
        yield running


def test_the_documented_servers_start(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def serve_on(self: Server, listening: socket.socket, on_ready: Callable[[], None]) -> None:
        begun.append(self._service.catalog.base)
        listening.close()
        self._service.close()

    monkeypatch.setattr(Server, "serve_on", serve_on)
    monkeypatch.chdir(desk)
    lines = [line for line in COMMANDS if line.startswith("loradeploy serve")]
    for line in lines:
        call(*shlex.split(line)[1:], "--port", "0")
    assert begun == ["bundle"] * 3


def test_the_requests_of_curl_are_answered(documented: Running, desk: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    lines = [shlex.split(line) for line in COMMANDS if line.startswith("curl")]
    assert len(lines) == 6
    answers = []
    for words in lines:
        words = [word.replace(URL, documented.url) for word in words]
        if "--json" in words:  # curl 7.82 and later; replaced for older versions
            at = words.index("--json")
            kind = ["--header", "Content-Type: application/json"]
            words[at : at + 2] = ["--data", words[at + 1], *kind]
        done = subprocess.run(
            [*words, "--silent", "--show-error", "--fail"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (words, done.stderr)
        answers.append(done.stdout)
    models, chat, stream, loaded, unloaded, _ = answers
    assert {model["id"] for model in json.loads(models)["data"]} == {"bundle", "headline", "sport"}
    assert json.loads(chat)["choices"][0]["message"]["role"] == "assistant"
    assert stream.count("data: ") > 2
    assert stream.endswith("data: [DONE]\n\n")
    assert "news" in loaded
    assert "removed" in unloaded


def test_the_documented_program_prints_the_texts_of_the_adapters(documented: Running) -> None:
    (program,) = blocks("python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program.replace(URL, documented.url), scope := {})
    scope["client"].close()
    lines = printed.getvalue().splitlines()
    answers = [line.split(" ", 2) for line in lines if line.startswith("answer")]
    blend = next(line for line in lines if line.startswith("blend"))
    texts = {text for _, _, text in answers} | {blend.partition(" ")[2]}
    assert [name for _, name, _ in answers] == ["bundle", "headline", "sport"]
    assert len(texts) == 4
    assert sum(line.startswith("piece") for line in lines) > 2
    assert sum(line.startswith("usage") for line in lines) == 1


def test_the_documented_key_file_is_valid(desk: Path) -> None:
    ring = KeyRing.read(desk / "keys.json")
    assert ring.check("Bearer replace-me-0123456789").requests_per_minute == 60
    assert ring.check("Bearer replace-me-9876543210").admin


def test_every_route_limit_and_figure_is_documented(documented: Running) -> None:
    described = httpx.get(f"{documented.url}/openapi.json").json()["paths"]
    for path in described:
        assert path.removesuffix("/{model}") in DOCUMENT
    for option in command("serve").params:
        if isinstance(option, click.Option) and option.name in vars(ServeLimits()):
            assert f"`{option.opts[0]}`" in DOCUMENT
    figures = httpx.get(f"{documented.url}/metrics").text
    table = DOCUMENT.partition("## Metrics")[2]
    for name in re.findall(r"`([a-z_0-9]+)(?:\{\w+\})?`", table):
        assert f"loradeploy:{name}" in figures or name == "loradeploy", name
    assert "serve" in VERBS
