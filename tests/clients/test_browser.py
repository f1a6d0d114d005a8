"""The client in Chromium gives Python's tokens, by WebAssembly and WebGPU, and the page works."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Required, unavailable
from tests.clients.test_js import COUNT, TOKENS, answers, calls, check_effect, told_by_python
from tests.conftest import ROOT, once

CHROMIUM = Path("/usr/bin/chromium")
# A software GPU takes seconds for the shaders of one batch: the prompt, and one step.
ON_GPU = {"prompts": [TOKENS] * 3, "adapters": [None, "all", "few"], "maxNewTokens": 2}
JOBS: list[dict[str, Any]] = [
    {"bundle": "/bundle/", "backend": "wasm", "calls": calls()},
    {
        "bundle": "/bundle/",
        "backend": "wasm",
        "add": {"cut": "/bundle/cut.safetensors", "peft": "/bundle/adapters/all"},
        "calls": [["generate", {"prompt": TOKENS, "adapter": "peft", "maxNewTokens": COUNT}]],
    },
    {"bundle": "/bundle/adapters/", "backend": "wasm"},
    {"bundle": "/bundle/", "backend": "webgpu", "calls": [["generate", ON_GPU]]},
    {"bundle": "/bundle/half/", "backend": "webgpu"},
]


@pytest.fixture(scope="session")
def browser(javascript: Path, required: Required, shared: Path) -> dict[str, Any]:
    """What js/browser.mjs saw: the jobs' results, the page, and a directory of screenshots."""
    if not CHROMIUM.exists():
        unavailable("Chromium is not installed: make devices")
    place = shared / "browser"

    def look(partial: Path) -> None:
        bundle = partial / "bundle"
        shutil.copytree(required("slots"), bundle)
        shutil.copytree(required("fp16"), bundle / "half")
        weights = (bundle / "adapters" / "all" / "adapter_model.safetensors").read_bytes()
        (bundle / "cut.safetensors").write_bytes(weights[:-100])
        config = bundle / "adapters" / "all" / "adapter_config.json"
        shutil.copyfile(config, bundle / "adapter_config.json")
        done = subprocess.run(
            [
                "node",
                ROOT / "tests" / "clients" / "js" / "browser.mjs",
                javascript,
                bundle,
                partial,
            ],
            input=json.dumps(JOBS),
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        (partial / "result.json").write_text(done.stdout)

    once(place, look)
    result: dict[str, Any] = json.loads((place / "result.json").read_text())
    return {**result, "screenshots": place}


def test_wasm_gives_pythons_tokens(browser: dict[str, Any], required: Required) -> None:
    result = browser["jobs"][0]
    assert "value" in result, result
    theirs = answers(result)
    assert theirs == told_by_python(required("slots"))
    check_effect(theirs)
    assert {"loradeploy.json", "required.onnx", "model.onnx.data"} <= set(result["value"]["files"])


def test_wasm_reads_adapters_by_url_and_refuses_what_is_broken(browser: dict[str, Any]) -> None:
    result = browser["jobs"][1]["value"]
    cut = result["added"]["cut"]
    assert cut["error"] == "AdapterError"
    assert "cut.safetensors is no valid safetensors file" in cut["message"]
    own = answers(browser["jobs"][0])[1]  # the same adapter, from the bundle's .onnx_adapter file
    assert result["answers"][0]["value"]["tokenIds"] == own["tokenIds"]
    missing = browser["jobs"][2]
    assert missing["error"] == "BundleError"
    assert missing["message"].endswith("/bundle/adapters/loradeploy.json does not exist")


def test_webgpu_gives_pythons_tokens(browser: dict[str, Any]) -> None:
    result = browser["jobs"][3]
    assert "value" in result, result
    ours = answers(browser["jobs"][0])[:3]  # Python's too
    theirs = answers(result)
    assert [row["tokenIds"] for row in theirs] == [row["tokenIds"][:2] for row in ours]
    assert len({tuple(row["tokenIds"]) for row in theirs}) == 3


def test_webgpu_refuses_fp16_where_the_gpu_has_none(browser: dict[str, Any]) -> None:
    result = browser["jobs"][4]
    assert result.get("error") == "BundleError", result
    assert "shader-f16" in result["message"]


def test_the_page_answers_by_the_adapter_that_is_picked(browser: dict[str, Any]) -> None:
    page = browser["page"]
    assert page["problems"] == []
    assert page["ready"].startswith("Ready after")
    assert page["options"] == ["Base model, no adapter", "all", "few"]
    # All of it by keyboard: the prompt has the focus, the picker is one step before it.
    assert (page["focused"], page["picker"]) == ("prompt", "adapter")
    assert set(page["answers"]) == {"", "all", "few"}
    assert len(set(page["answers"].values())) == 3
    assert page["steps"] > 3, "the text did not stream"
    assert "tokens in" in page["figures"]


def test_the_page_says_what_went_wrong(browser: dict[str, Any]) -> None:
    too_long, missing = browser["page"]["tooLong"], browser["page"]["missing"]
    assert "the model takes 127: shorten it" in too_long["error"]
    assert too_long["enabled"]  # another prompt can be tried
    assert missing["status"] == "The model could not be loaded."
    assert missing["error"].endswith("/nothing/loradeploy.json does not exist")
    assert not missing["enabled"]


def test_the_page_fits_a_phone_and_a_desktop_in_light_and_dark(browser: dict[str, Any]) -> None:
    phone, desktop = browser["views"]["phone-light"], browser["views"]["desktop-dark"]
    assert (phone["overflow"], desktop["overflow"]) == (0, 0)
    assert (phone["columns"], desktop["columns"]) == (1, 2)
    assert phone["background"] != desktop["background"]
    for name in ("phone-light", "desktop-dark", "missing"):
        assert (browser["screenshots"] / f"{name}.png").stat().st_size > 5000
