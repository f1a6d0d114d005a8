"""Execution providers by the names of the command line and by ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from loradeploy.errors import UsageError
from loradeploy.runtime.providers import KNOWN, Provider, add_plugins, full_name, resolve

CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
PLUGIN = "WebGpuExecutionProvider"


@pytest.fixture(autouse=True)
def every_provider_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [provider.full for provider in KNOWN]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: installed)


@pytest.fixture
def registered_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A device of a registered library, as ONNX Runtime lists it."""
    device = SimpleNamespace(ep_name=PLUGIN)
    present = onnxruntime.get_ep_devices()
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [*present, device])
    yield device


@pytest.mark.parametrize(
    ("providers", "resolved"),
    [
        (None, [(CPU, {})]),
        (["cuda"], [(CUDA, {})]),
        (["CUDA"], [(CUDA, {})]),
        (["cuda:1"], [(CUDA, {"device_id": 1})]),
        ([f"{CUDA}:2", "cpu"], [(CUDA, {"device_id": 2}), (CPU, {})]),
        ([("cuda", {"arena_extend_strategy": 1})], [(CUDA, {"arena_extend_strategy": 1})]),
        (["tensorrt:1"], [(TENSORRT, {"device_id": 1}), (CUDA, {"device_id": 1})]),
        ([TENSORRT], [(TENSORRT, {})]),
    ],
)
def test_a_provider_goes_by_either_name(
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
        (["nothing"], "this onnxruntime has no 'nothing', it has CPUExecutionProvider, CUDA"),
    ],
)
def test_what_is_no_provider_is_refused(providers: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(providers)


def test_a_provider_that_is_not_installed_names_its_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(UsageError, match="has no 'CUDAExec.*: pip install onnxruntime-gpu"):
        resolve(["cuda"])


def test_a_registered_library_s_provider_is_given_by_its_devices(registered_plugin: Any) -> None:
    assert full_name("webgpu") == PLUGIN
    given: list[Any] = []
    options: Any = SimpleNamespace(add_provider_for_devices=lambda *args: given.append(args))
    assert add_plugins(options, resolve([("webgpu", {"validation": 1}), "cpu"]))
    assert given == [([registered_plugin], {"validation": "1"})]
    assert not add_plugins(options, resolve(["cuda"]))


@pytest.mark.usefixtures("registered_plugin")
def test_a_library_s_provider_stands_beside_no_built_in_one() -> None:
    with pytest.raises(UsageError, match=f"{CUDA} and {PLUGIN} cannot be given together"):
        add_plugins(
            SimpleNamespace(add_provider_for_devices=lambda *_: None), resolve(["webgpu", "cuda"])
        )


def test_a_provider_that_is_named_keeps_its_options_behind_one_that_brings_it() -> None:
    limits = {"gpu_mem_limit": 5}
    found = dict(resolve(["tensorrt", ("cuda", limits), "cpu"]))
    assert found["CUDAExecutionProvider"] == limits
    found = dict(resolve([("tensorrt", {"device_id": 1})]))
    assert found["CUDAExecutionProvider"] == {"device_id": 1}


@pytest.mark.parametrize(
    "providers", [["cuda:0", "cuda:1"], [("cuda:1", {"device_id": 0})]], ids=["twice", "options"]
)
def test_two_devices_of_one_provider_are_refused(providers: list[Any]) -> None:
    with pytest.raises(UsageError, match="twice|choose device"):
        resolve(providers)
