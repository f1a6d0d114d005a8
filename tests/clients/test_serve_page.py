"""The web page of `loradeploy serve` in Chromium: texts of two adapters side by side."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.clients.test_browser import CHROMIUM
from tests.conftest import ROOT
from tests.devices import unavailable
from tests.serve.conftest import serving

USER = {"role": "user", "content": "Shares rose"}


@pytest.fixture(scope="module")
def seen(
    javascript: Path,
    tiny_llama_bundle: Path,
    client_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """The output of js/serve_page.mjs and the screenshots."""
    if not CHROMIUM.exists():
        unavailable("Chromium is not installed: make devices")
    screenshots = tmp_path_factory.mktemp("screenshots")
    script = ROOT / "tests" / "clients" / "js" / "serve_page.mjs"
    with serving(tiny_llama_bundle, adapters=client_adapters) as running:
        done = subprocess.run(
            ["node", script, javascript, running.url, screenshots],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    host = running.url.removeprefix("http://")
    return {**result, "screenshots": screenshots, "host": host}


@pytest.fixture(scope="module")
def library(tiny_llama_bundle: Path, client_adapters: dict[str, Path]) -> TextGenerator:
    session = AdapterSession(tiny_llama_bundle)
    for name, path in client_adapters.items():
        session.load(name, path)
    return TextGenerator(session)


def test_texts_of_two_adapters_are_shown_side_by_side(
    seen: dict[str, Any], library: TextGenerator
) -> None:
    assert seen["problems"] == []
    assert seen["hosts"] == [seen["host"]]  # no requests to other hosts
    assert seen["models"] == ["bundle-llama (base)", "all", "few"]
    assert (seen["picked"], seen["focused"]) == (["all", "few"], "prompt")
    assert "2 adapters" in seen["status"]
    for number, name in enumerate(("all", "few")):
        first, second = seen["turns"][number]
        (expected,) = library.generate([[USER]], name, max_new_tokens=12)
        assert seen["chat"][number] == [first]
        assert first == (expected.text or "(an empty answer)")
        before = [USER, {"role": "assistant", "content": first}] if expected.text else []
        asked = [*before, {"role": "user", "content": "And then?"}]
        (expected,) = library.generate([asked], name, max_new_tokens=12)
        assert second == (expected.text or "(an empty answer)")
    assert seen["chat"][0] != seen["chat"][1]
    assert seen["steps"][0] > 3, "the text did not stream"
    assert "tokens in" in seen["figures"][0][0]


def test_a_prompt_can_be_sent_without_the_chat_template(
    seen: dict[str, Any], library: TextGenerator
) -> None:
    (expected,) = library.generate(["Shares rose"], max_new_tokens=12)
    assert seen["plain"] == [[expected.text], []]


def test_refusals_of_the_service_are_shown(seen: dict[str, Any]) -> None:
    assert "positions" in seen["wrong"][0][0]
    assert seen["enabled"]
    assert seen["stopped"][0][-1] == "stopped" or "tokens in" in seen["stopped"][0][-1]


def test_the_page_fits_a_phone_and_a_desktop(seen: dict[str, Any]) -> None:
    phone, desktop = seen["views"]["phone"], seen["views"]["desktop"]
    assert (phone["overflow"], desktop["overflow"]) == (0, 0)
    assert (phone["columns"], desktop["columns"]) == (1, 2)
    assert (phone["sendable"], desktop["sendable"]) == (True, True)
    assert phone["background"] != desktop["background"]
    for name in ("phone", "desktop"):
        assert (seen["screenshots"] / f"{name}.png").stat().st_size > 5000
