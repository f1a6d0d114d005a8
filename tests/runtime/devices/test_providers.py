"""Execution providers by their names on the command line and in ONNX Runtime."""

from __future__ import annotations

import json
from typing import Any

import onnxruntime
import pytest

from loradeploy.errors import UsageError
from loradeploy.runtime.devices.providers import Provider, resolve
from loradeploy.runtime.devices.table import BY_NAME, KNOWN, KnownProvider, known
from tests.conftest import ROOT

# fp32 products in fp32; CUDA's default may be TF32.
FP32 = {"use_tf32": "0"}
CPU, CUDA, TENSORRT, OPENVINO = (
    f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt", "OpenVINO")
)
# OpenVINO computes in bf16 where supported, unless f32 is requested.
PRECISE = BY_NAME["openvino"].options


@pytest.fixture(autouse=True)
def every_provider_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [provider.full for provider in KNOWN]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: installed)


@pytest.mark.parametrize(
    ("providers", "resolved"),
    [
        (None, [(CPU, {})]),
        (["cuda"], [(CUDA, FP32)]),
        (["CUDA"], [(CUDA, FP32)]),
        (["cuda:1"], [(CUDA, {**FP32, "device_id": 1})]),
        ([("cuda", {"use_tf32": 1})], [(CUDA, {"use_tf32": 1})]),
        ([f"{CUDA}:2", "cpu"], [(CUDA, {**FP32, "device_id": 2}), (CPU, {})]),
        ([("cuda", {"arena_extend_strategy": 1})], [(CUDA, {**FP32, "arena_extend_strategy": 1})]),
        (["tensorrt:1"], [(TENSORRT, {"device_id": 1}), (CUDA, {**FP32, "device_id": 1})]),
        ([TENSORRT], [(TENSORRT, {})]),
        (["coreml"], [("CoreMLExecutionProvider", {})]),
        (["WebGPU"], [("WebGpuExecutionProvider", {})]),
        (["openvino:2"], [(OPENVINO, {**PRECISE, "device_number": 2})]),
        ([("openvino", {"load_config": "{}"})], [(OPENVINO, {"load_config": "{}"})]),
    ],
)
def test_a_provider_can_be_given_by_either_name(
    providers: list[Provider] | None, resolved: list[tuple[str, dict[str, Any]]]
) -> None:
    assert resolve(providers) == resolved


@pytest.mark.parametrize(
    ("providers", "message"),
    [
        ("cuda", "give a list of names"),
        ([], "providers is empty"),
        ([3], "a provider is 3"),
        (["cuda:first"], "give NAME or NAME:NUMBER"),
        (["cpu:1"], "has no devices to choose"),
        (["webgpu:1"], "has no devices to choose"),
        ([("openvino", {"device_number": "GPU"})], "has device_number 'GPU': give the number"),
        ([("openvino", {"device_number": -1})], "has device_number -1: give the number"),
        ([("cuda", {"device_id": "first"})], "has device_id 'first': give the number"),
        (["nothing"], "this onnxruntime has no 'nothing', it has CPUExecutionProvider, CUDA"),
    ],
)
def test_an_unknown_provider_is_refused(providers: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(providers)


def test_a_provider_that_is_not_installed_names_its_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(UsageError, match="has no 'CUDAExec.*: pip install onnxruntime-gpu"):
        resolve(["cuda"])


def test_a_plugin_that_is_not_installed_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(UsageError, match="has no 'QNNExec.*: pip install onnxruntime-qnn"):
        resolve(["qnn"])


def test_capabilities_of_an_unknown_provider_are_not_assumed() -> None:
    row = known("NewExecutionProvider")
    assert row.feeds_all
    assert not row.takes_defaults
    assert not row.like_cpu
    assert known("OpenVINOExecutionProvider.AUTO").options == PRECISE


def test_a_named_provider_keeps_its_options_after_one_that_includes_it() -> None:
    limits = {"gpu_mem_limit": 5}
    found = dict(resolve(["tensorrt", ("cuda", limits), "cpu"]))
    assert found["CUDAExecutionProvider"] == {**FP32, **limits}
    found = dict(resolve([("tensorrt", {"device_id": 1})]))
    assert found["CUDAExecutionProvider"] == {**FP32, "device_id": 1}


@pytest.mark.parametrize(
    "providers", [["cuda:0", "cuda:1"], [("cuda:1", {"device_id": 0})]], ids=["twice", "options"]
)
def test_two_devices_of_one_provider_are_refused(providers: list[Any]) -> None:
    with pytest.raises(UsageError, match="twice|choose device"):
        resolve(providers)


@pytest.mark.parametrize("value", ["1", 1, True])
def test_provider_options_that_would_replay_the_first_inputs_are_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="enable_cuda_graph: .* go on reading the first ones"):
        resolve([("cuda", {"enable_cuda_graph": value})])
    ((_, options),) = resolve([("cuda", {"enable_cuda_graph": "0"})])
    assert options["enable_cuda_graph"] == "0"


def test_openvino_gets_the_option_for_f32() -> None:
    devices = json.loads(PRECISE["load_config"])
    assert devices["CPU"] == devices["GPU"] == {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.name)
def test_the_documentation_has_every_provider(row: KnownProvider) -> None:
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith(f"| `{row.name}` |"))
    package = row.plugin.package if row.plugin else row.builds[0]
    assert package in line
    assert ("(plugin)" in line) == (row.plugin is not None)
    assert ("device" in line.split("|")[4]) == (row.device != "cpu")
