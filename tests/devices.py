"""Requirements of the device tests: without them tests are skipped, or fail if CI demands them."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
from pathlib import Path
from typing import NoReturn

import pytest

from loradeploy.runtime.devices.table import SOFTWARE_ADAPTER

# Where Chromium installs SwiftShader's driver, by distribution.
_DRIVERS = ("/usr/lib/chromium", "/usr/lib/chromium-browser", "/opt/google/chrome")
DRIVER = "VK_ICD_FILENAMES"


def unavailable(reason: str) -> NoReturn:
    """Skip the test, or fail it where LORADEPLOY_DEVICES=required says that it must run."""
    if os.environ.get("LORADEPLOY_DEVICES") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


def swiftshader() -> dict[str, str]:
    """Return environment variables with which WebGPU finds SwiftShader, or call `unavailable`."""
    variables, missing = _search()
    if missing:
        unavailable(f"not installed: {', '.join(missing)}")
    return variables


def enable_swiftshader() -> None:
    """Set its environment variables, if it is installed.

    Before any test: the plugin lists its devices once, when a process registers it.
    """
    variables, missing = _search()
    if not missing:
        os.environ.update(variables)


def _search() -> tuple[dict[str, str], list[str]]:
    """Return the environment variables for SwiftShader, and what is not installed."""
    files = [Path(place) / "vk_swiftshader_icd.json" for place in _DRIVERS]
    driver = os.environ.get(DRIVER) or next((str(f) for f in files if f.exists()), "")
    needed = {
        "onnxruntime-ep-webgpu": importlib.util.find_spec("onnxruntime_ep_webgpu"),
        "SwiftShader (make devices)": driver,
        "libvulkan.so.1 (make devices)": ctypes.util.find_library("vulkan"),
    }
    missing = [what for what, there in needed.items() if not there]
    return {DRIVER: driver, SOFTWARE_ADAPTER: "1"}, missing
