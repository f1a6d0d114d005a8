"""WebGPU (on SwiftShader): every form of graph computes the same as the CPU, with adapters too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.devices import swiftshader
from tests.runtime.devices.conftest import run
from tests.tolerances import tolerance

WEBGPU, CPU = "WebGpuExecutionProvider", "CPUExecutionProvider"
# By case: the adapters whose results are compared with the CPU.
COMPARED = {
    "slots": ["base", "small", "large", "partial", "small again", "mixed", "blend"],
    "rows": ["base", "partial", "mixed"],
    "branches": ["base", "partial", "mixed", "base again"],
    "required_inputs": ["base", "partial", "mixed"],
    "output_changes": ["base", "dora", "mixed"],
    "heads": ["base", "small", "mixed"],
    "gqa": ["base", "mixed"],
}
# Nodes of the tiny Llama's graph without a WebGPU kernel, or with a wrong one.
ON_CPU = {
    "Add", "And", "Attention", "Cast", "Concat", "Cos", "Equal", "LessOrEqual", "Or", "Range",
    "Reshape", "Shape", "Sin", "Squeeze", "Unsqueeze", "Expand", "ConstantOfShape", "CumSum",
}  # fmt: skip


def test_the_process_did_not_crash(webgpu: dict[str, Any]) -> None:
    assert webgpu["status"] == 0, webgpu["errors"]


@pytest.mark.parametrize("case", COMPARED)
def test_every_form_computes_the_same_as_the_cpu(webgpu: dict[str, Any], case: str) -> None:
    for what in COMPARED[case]:
        found = webgpu[case][what]
        assert found["error"] <= tolerance("webgpu-cpu"), what
        if not what.startswith("base"):
            assert found["effect"] >= 1000 * tolerance("webgpu-cpu"), what


def test_swapping_back_gives_identical_results(webgpu: dict[str, Any]) -> None:
    slots = webgpu["slots"]
    assert slots["small again"] == slots["small"]
    assert slots["large"]["effect"] != slots["small"]["effect"]


def test_factors_and_caches_are_in_device_memory(webgpu: dict[str, Any]) -> None:
    slots = webgpu["slots"]
    assert slots["memory"] == ["webgpu"]
    assert slots["device_bytes"] > slots["host_device_bytes"] == 0


def test_generated_text_is_that_of_the_cpu(webgpu: dict[str, Any]) -> None:
    base, _, mixed = webgpu["slots"]["texts"]
    assert mixed[0] != base[0]
    for case in ("slots", "rows", "gqa"):
        for on_cpu, on_device in webgpu[case]["texts"]:
            assert on_device == on_cpu, case


def test_classifiers_keep_their_own_heads(webgpu: dict[str, Any]) -> None:
    on_cpu, on_device = (np.array(scores) for scores in webgpu["heads"]["scores"])
    assert np.abs(on_cpu - on_device).max() <= tolerance("webgpu-cpu")
    assert np.abs(on_cpu[0] - on_cpu[1]).max() > 0.1


def test_no_product_of_an_adapter_falls_back_to_the_cpu(webgpu: dict[str, Any]) -> None:
    assert webgpu["slots"]["providers"] == [WEBGPU, CPU]
    placed = webgpu["slots"]["placement"]
    assert set(placed[CPU]) - ON_CPU == {"Mul"}
    assert placed[CPU]["Mul"] == 1  # for the number of logits
    assert placed[CPU]["And"] == 2  # broadcasting: WebGPU's kernel is wrong after other shapes
    assert "MatMul" not in placed[CPU]
    assert "GroupQueryAttention" in webgpu["gqa"]["placement"][WEBGPU]


def test_a_graph_without_defaults_gets_every_side_input(webgpu: dict[str, Any]) -> None:
    assert webgpu["required_inputs"]["optional"] == 0


def test_a_wrong_kernel_is_detected_at_opening(webgpu: dict[str, Any]) -> None:
    found = webgpu["wrong_kernel"]
    assert found["kind"] == "DeviceError"
    assert found["message"].startswith(f"{WEBGPU} computes something else than the CPU (the base)")
    assert "GroupQueryAttention is wrong from 32 tokens on" in found["message"]


def test_recorded_runs_are_replayed_with_the_adapters_of_each_step(webgpu: dict[str, Any]) -> None:
    found = webgpu["replays"]
    assert found["placement"] == [WEBGPU]
    assert found["error"] <= tolerance("webgpu-cpu") and found["again"] == 0
    assert found["effect"] >= 1000 * tolerance("webgpu-cpu")
    # The base, ranks 64 and 8, and one slot per row of rank 8.
    assert found["captured"] == 4 and found["device_bytes"] > 0
    assert found["after other feeds"] == 0


def test_a_graph_with_nodes_on_the_cpu_is_not_recorded(webgpu: dict[str, Any]) -> None:
    found = webgpu["not_recordable"]
    assert found["kind"] == "UsageError"
    assert found["message"].startswith(f"`capture_graphs`: {WEBGPU} leaves nodes of ")


def test_the_provider_is_chosen_by_name_or_in_session_options(webgpu: dict[str, Any]) -> None:
    found = webgpu["session_options"]
    assert found["opened"] == [[WEBGPU, CPU]] * 2  # the same options twice
    assert found["own options"] == [WEBGPU, CPU]
    partial = found["own options, partial"]
    assert partial["error"] <= tolerance("webgpu-cpu") < partial["effect"]
    assert found["with options"][WEBGPU]["powerPreference"] == "low-power"
    assert "the providers of an earlier session" in found["other"]
    assert "both choose execution providers" in found["both"]


NO_DEVICE = """
import sys
import loradeploy as ld
print(ld.AdapterSession(sys.argv[1], ["webgpu", "cpu"]).providers)
ld.AdapterSession(sys.argv[1], ["webgpu"])
"""


@pytest.mark.parametrize(
    ("unset", "message"),
    [
        ("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "is installed and finds no device here"),
        ("VK_ICD_FILENAMES", "is installed and finds a device, which does not start"),
    ],
)
def test_without_a_device_the_cpu_is_used_if_it_is_named_too(
    tiny_llama_bundle: Path, unset: str, message: str
) -> None:
    environment = {name: value for name, value in swiftshader().items() if name != unset}
    done = run(["-c", NO_DEVICE, str(tiny_llama_bundle)], environment=environment)
    assert done.stdout.strip() == f"('{CPU}',)"
    assert f"{WEBGPU} {message}" in done.stderr
    assert "UsageError" in done.stderr.splitlines()[-1]
    assert "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1" in done.stderr.splitlines()[-1]
