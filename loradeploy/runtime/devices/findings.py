"""Examine this machine's execution providers: installed, their devices, and what is missing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from loradeploy.errors import UsageError, listed_names
from loradeploy.runtime.devices.facts import device_facts
from loradeploy.runtime.devices.plugins import is_installed, plugin_devices, register
from loradeploy.runtime.devices.providers import preload_cuda
from loradeploy.runtime.devices.starting import check_starts, why_not
from loradeploy.runtime.devices.table import CPU, KNOWN, KnownProvider, Plugin

Status = Literal["ok", "note", "problem"]

# Files that show NVIDIA's driver: on Linux, in Windows' subsystem for Linux, and on Windows.
_NVIDIA: Final = (
    "dev/nvidiactl",
    "usr/lib/wsl/lib/libcuda.so.1",
    "Windows/System32/nvcuda.dll",
)
_CUDA_LIBRARIES: Final = (
    "pip install 'onnxruntime-gpu[cuda,cudnn]' for the CUDA and cuDNN libraries that this build"
    " needs (loradeploy loads them from there), and check with nvidia-smi that the driver is new"
    " enough for them"
)


@dataclass(frozen=True)
class Finding:
    """The result of one check. `advice`: how to solve a note or a problem."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def machine_root() -> Path:
    """The root directory of the machine's files."""
    return Path(os.path.abspath(os.sep))


def has_nvidia_device(root: Path) -> bool:
    """Whether NVIDIA's driver is loaded; `root` is the machine's root directory."""
    return any((root / place).exists() for place in _NVIDIA)


def provider_findings(root: Path) -> list[Finding]:
    """Findings for each provider that is built in or installed, and one for all others."""
    import onnxruntime

    built_in = set(onnxruntime.get_available_providers()) - plugin_devices().keys()
    findings, missing = [], []
    for row in KNOWN:
        if row.full in built_in:
            if row.device == "cuda" and row.name != "cuda" and not has_nvidia_device(root):
                continue  # the finding for CUDA is sufficient
            findings.append(_built_in(row, root))
        elif row.plugin is not None and is_installed(row.plugin):
            findings.append(_plugin(row, row.plugin))
        elif row.name == "cuda" and has_nvidia_device(root):
            findings.append(
                _finding(
                    row,
                    "note",
                    "there is an NVIDIA device, and this onnxruntime is built without CUDA",
                    "pip uninstall the onnxruntime there is, then pip install"
                    " 'onnxruntime-gpu[cuda,cudnn]'",
                )
            )
        else:
            missing.append(f"{row.name} ({_package(row)})")
    if missing:
        names = ", ".join(missing)
        findings.append(Finding("providers not installed", "ok", f"{names}; see docs/devices.md"))
    return findings


def _package(row: KnownProvider) -> str:
    return row.plugin.package if row.plugin is not None else " or ".join(row.builds)


def _finding(row: KnownProvider, status: Status, detail: str, advice: str = "") -> Finding:
    return Finding(f"provider {row.name}", status, detail, advice)


def _built_in(row: KnownProvider, root: Path) -> Finding:
    """Whether a built-in provider starts; onnxruntime lists it even without a device."""
    cuda = row.device == "cuda"
    if cuda and not has_nvidia_device(root):
        return _finding(
            row,
            "note",
            "built in, and there is no NVIDIA device here",
            "nothing to do if the CPU is to run the graphs",
        )
    if cuda:
        preload_cuda()
    why = why_not(row.full, row.options)
    if why is None:
        return _finding(row, "ok", f"built in, and starts{_listed(_built_in_devices(row))}")
    if row.name == "cuda":
        detail = f"there is an NVIDIA device, and the provider does not start: {why}"
        return _finding(row, "problem", detail, _CUDA_LIBRARIES)
    return _finding(row, "note", f"built in, and does not start: {why}", f"it needs {row.needs}")


def _plugin(row: KnownProvider, plugin: Plugin) -> Finding:
    """Whether an installed plugin finds a device on which it starts."""
    installed = f"{plugin.package} {_version(plugin)}"
    needs = f"it needs {row.needs}"
    try:
        register(row.full, plugin)
    except UsageError as problem:
        return _finding(row, "problem", str(problem), f"pip install --upgrade {plugin.package}")
    devices = plugin_devices().get(row.full, [])
    if not devices:
        return _finding(row, "note", f"{installed} finds no device here", needs)
    try:
        for device in devices:
            check_starts(row.full, dict(row.options), device)
    except UsageError as problem:
        return _finding(row, "problem", f"{installed}: {problem}", needs)
    return _finding(row, "ok", f"{installed}, and starts{_listed(devices)}")


def _version(plugin: Plugin) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(plugin.package)
    except importlib.metadata.PackageNotFoundError:  # built from source
        return "of an unknown version"


def _built_in_devices(row: KnownProvider) -> list[Any]:
    import onnxruntime

    if row.full == CPU:
        return []
    devices: list[Any] = onnxruntime.get_ep_devices()
    return [device for device in devices if device.ep_name == row.full]


def _listed(devices: Sequence[Any]) -> str:
    """For example " on 0: GPU NVIDIA H200"; empty if onnxruntime lists no device."""
    named = [f"{number}: {device_facts(d.device)}" for number, d in enumerate(devices)]
    return f" on {listed_names(named)}" if named else ""
