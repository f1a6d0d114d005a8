"""The browser client in Chromium: Python's tokens with WebAssembly and WebGPU, and the page."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import Generation, TextGenerator
from tests.clients.conftest import Required
from tests.clients.generations import (
    ADAPTERS,
    COUNT,
    PROMPTS,
    TOKENS,
    answers,
    calls,
    check_effect,
    results_of_python,
)
from tests.conftest import ROOT, once
from tests.devices import unavailable

CHROMIUM = Path("/usr/bin/chromium")
# A software GPU takes seconds to compile the shaders of a batch, so: the prompt and one step. Rows
# of different lengths test the mask; 36 columns, a multiple of 4, use the vectorized kernels.
LONG = list(range(20, 56))
ON_GPU: dict[str, Any] = {
    "prompts": [LONG, TOKENS, LONG, TOKENS],
    "adapters": [None, None, "all", "few"],
    "maxNewTokens": 2,
}
# The prompts of the batch, alone: their int4 logits are close to those in the batch.
ALONE = [
    ["generate", {"prompt": prompt, "adapter": name, "maxNewTokens": COUNT}]
    for prompt, name in zip(PROMPTS, ADAPTERS, strict=True)
]
JOBS: dict[str, dict[str, Any]] = {
    "wasm": {"bundle": "/bundle/", "backend": "wasm", "calls": calls()},
    "adapters": {
        "bundle": "/bundle/",
        "backend": "wasm",
        "add": {"cut": "/bundle/cut.safetensors", "peft": "/bundle/adapters/all"},
        "calls": [["generate", {"prompt": TOKENS, "adapter": "peft", "maxNewTokens": COUNT}]],
    },
    "missing": {"bundle": "/bundle/adapters/", "backend": "wasm"},
    "int4": {"bundle": "/bundle/int4/", "backend": "wasm", "calls": [calls()[-1], *ALONE]},
    "slots": {"bundle": "/bundle/", "backend": "webgpu", "calls": [["generate", ON_GPU]]},
    "gqa": {"bundle": "/bundle/gqa/", "backend": "webgpu", "calls": [["generate", ON_GPU]]},
    "fp16": {"bundle": "/bundle/fp16/", "backend": "webgpu"},
}


def joined_bools() -> bytes:
    """Return an ONNX model of a single And on 4-dimensional bools of any shape."""
    import onnx

    bools = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("And", ["x", "y"], ["z"])],
        "and",
        [bools(name, onnx.TensorProto.BOOL, [None] * 4) for name in ("x", "y")],
        [bools("z", onnx.TensorProto.BOOL, [None] * 4)],
    )
    opset = onnx.helper.make_opsetid("", 20)
    content: bytes = onnx.helper.make_model(
        graph, ir_version=9, opset_imports=[opset]
    ).SerializeToString()
    return content


def on_gpu_by_python(bundle: Path) -> list[Generation]:
    """Return TextGenerator's results for `ON_GPU`."""
    generator = TextGenerator(AdapterSession(bundle))
    return generator.generate(
        ON_GPU["prompts"], adapters=ON_GPU["adapters"], max_new_tokens=ON_GPU["maxNewTokens"]
    )


@pytest.fixture(scope="session")
def browser(javascript: Path, required: Required, shared: Path) -> dict[str, Any]:
    """The output of js/browser.mjs: results of the jobs, page states, and screenshots."""
    if not CHROMIUM.exists():
        unavailable("Chromium is not installed: make devices")
    place = shared / "browser"

    def look(partial: Path) -> None:
        bundle = partial / "bundle"
        shutil.copytree(required("slots"), bundle)
        for form in ("int4", "gqa", "fp16"):
            shutil.copytree(required(form), bundle / form)
        (bundle / "and.onnx").write_bytes(joined_bools())
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
            input=json.dumps(list(JOBS.values())),
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        (partial / "result.json").write_text(done.stdout)

    once(place, look)
    result: dict[str, Any] = json.loads((place / "result.json").read_text())
    jobs = dict(zip(JOBS, result["jobs"], strict=True))
    return {**result, "jobs": jobs, "screenshots": place}


def test_wasm_gives_pythons_tokens(browser: dict[str, Any], required: Required) -> None:
    result = browser["jobs"]["wasm"]
    assert "value" in result, result
    theirs = answers(result)
    assert theirs == results_of_python(required("slots"))
    check_effect(theirs)
    assert {"loradeploy.json", "required.onnx", "model.onnx.data"} <= set(result["value"]["files"])


def test_wasm_gives_rows_of_an_int4_batch_the_same_text_as_alone(browser: dict[str, Any]) -> None:
    found = [row["tokenIds"] for row in answers(browser["jobs"]["int4"])]
    batch, alone = found[: len(PROMPTS)], found[len(PROMPTS) :]
    assert batch == alone
    assert len({tuple(row) for row in batch}) == len(batch)


def test_wasm_reads_adapters_by_url_and_refuses_broken_ones(browser: dict[str, Any]) -> None:
    result = browser["jobs"]["adapters"]["value"]
    cut = result["added"]["cut"]
    assert cut["error"] == "AdapterError"
    assert "cut.safetensors is not a valid safetensors file" in cut["message"]
    own = answers(browser["jobs"]["wasm"])[1]  # the same adapter from the bundle
    assert result["answers"][0]["value"]["tokenIds"] == own["tokenIds"]
    missing = browser["jobs"]["missing"]
    assert missing["error"] == "BundleError"
    assert missing["message"].endswith("/bundle/adapters/loradeploy.json does not exist")


@pytest.mark.parametrize("form", ["slots", "gqa"])
def test_webgpu_gives_pythons_tokens_to_rows_of_different_lengths(
    browser: dict[str, Any], required: Required, form: str
) -> None:
    result = browser["jobs"][form]
    assert "value" in result, result
    theirs = [row["tokenIds"] for row in answers(result)]
    assert theirs == [list(answer.token_ids) for answer in on_gpu_by_python(required(form))]
    assert theirs[0] != theirs[2]  # the same prompt
    assert theirs[1] != theirs[3]


def test_webgpu_computes_and_wrongly_so_it_is_placed_on_the_cpu(
    browser: dict[str, Any],
) -> None:
    # Reproduces the state after another session of the page; the batches above ran after it.
    assert browser["and"] > 0, (
        "this onnxruntime-web is right: src/backend.js may give And to the GPU"
    )


def test_webgpu_refuses_fp16_if_the_gpu_does_not_support_it(browser: dict[str, Any]) -> None:
    result = browser["jobs"]["fp16"]
    assert result.get("error") == "BundleError", result
    assert "shader-f16" in result["message"]


def test_the_page_generates_with_the_selected_adapter(browser: dict[str, Any]) -> None:
    page = browser["page"]
    assert page["problems"] == []
    assert page["ready"].startswith("Ready after")
    assert page["options"] == ["Base model, no adapter", "all", "few"]
    # By keyboard only: the prompt has the focus, and the selection is one tab stop before it.
    assert (page["focused"], page["picker"]) == ("prompt", "adapter")
    assert set(page["answers"]) == {"", "all", "few"}
    assert len(set(page["answers"].values())) == 3
    assert page["steps"] > 3, "the text did not stream"
    assert "tokens in" in page["figures"]


def test_the_page_shows_errors(browser: dict[str, Any]) -> None:
    too_long, missing = browser["page"]["tooLong"], browser["page"]["missing"]
    assert "the model takes 127: shorten it" in too_long["error"]
    assert too_long["enabled"]  # another prompt can be sent
    assert missing["status"] == "The model could not be loaded."
    assert missing["error"].endswith("/nothing/loradeploy.json does not exist")
    assert not missing["enabled"]


def test_the_page_shows_that_a_package_is_missing(browser: dict[str, Any]) -> None:
    missing = browser["page"]["noPackages"]
    assert missing["status"] == "The model could not be loaded."
    assert missing["error"].startswith("The client or one of its packages cannot be loaded.")
    assert not missing["progress"]


def test_the_page_fits_a_phone_and_a_desktop_in_light_and_dark(browser: dict[str, Any]) -> None:
    phone, desktop = browser["views"]["phone-light"], browser["views"]["desktop-dark"]
    assert (phone["overflow"], desktop["overflow"]) == (0, 0)
    assert (phone["columns"], desktop["columns"]) == (1, 2)
    assert phone["background"] != desktop["background"]
    for name in ("phone-light", "desktop-dark", "missing"):
        assert (browser["screenshots"] / f"{name}.png").stat().st_size > 5000
