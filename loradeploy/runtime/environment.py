"""What is installed, what runs, and the traps that are known."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from typing import Final, Literal

Status = Literal["ok", "note", "problem"]

_PACKAGES: Final = (
    "loradeploy", "numpy", "onnxruntime-gpu", "onnxruntime", "safetensors", "tokenizers",
    "torch", "transformers", "accelerate", "onnx", "onnx-ir", "onnxscript", "peft",
    "onnxruntime-genai",
)  # fmt: skip
# Distributions that write the same files: whichever was installed last wins, in silence.
_ONNXRUNTIMES: Final = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `advice` is what to do about a note or a problem."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at this Python, its packages, onnxruntime's providers, and the known traps."""
    versions = {name: _version(name) for name in _PACKAGES}
    findings = [Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")]
    findings += [
        Finding(name, "ok", version) for name, version in versions.items() if version is not None
    ]
    findings.append(_one_onnxruntime())
    findings += _providers(versions["torch"])
    findings += _extras(versions)
    findings.append(_threads())
    return findings


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _one_onnxruntime() -> Finding:
    name = "one onnxruntime"
    found = [package for package in _ONNXRUNTIMES if _version(package) is not None]
    if len(found) == 1:
        return Finding(name, "ok", found[0])
    if not found:
        return Finding(name, "problem", "none is installed", "pip install loradeploy")
    return Finding(
        name,
        "problem",
        f"{' and '.join(found)} are both installed and overwrite each other's files",
        f"pip uninstall {' '.join(found)}, then install the one you need"
        " (onnxruntime-genai depends on onnxruntime: give it an environment of its own)",
    )


def _providers(torch: str | None) -> list[Finding]:
    try:
        import onnxruntime
    except ImportError as problem:
        return [Finding("onnxruntime", "problem", f"cannot be imported: {problem}", "reinstall it")]
    available = onnxruntime.get_available_providers()
    findings = [Finding("providers in this build", "ok", ", ".join(available))]
    if "CUDAExecutionProvider" not in available:
        return findings
    if not _has_nvidia_device():
        findings.append(
            Finding(
                "CUDA",
                "note",
                "onnxruntime could use it, and there is no NVIDIA device here",
                "nothing to do where the CPU is meant to run it",
            )
        )
    elif torch is not None and torch.endswith("+cpu"):
        findings.append(
            Finding("CUDA", "note", "there is a device, but torch is a CPU build",
                    "install a CUDA build of torch to train on the device")
        )  # fmt: skip
    else:
        findings.append(Finding("CUDA", "ok", "there is a device"))
    return findings


def _has_nvidia_device() -> bool:
    return os.path.exists("/dev/nvidiactl") or (
        sys.platform == "win32" and os.path.exists(r"C:\Windows\System32\nvcuda.dll")
    )


def _extras(versions: dict[str, str | None]) -> list[Finding]:
    findings = []
    for extra, packages in {
        "train": ("torch", "transformers", "accelerate"),
        "export": ("torch", "transformers", "onnx", "onnx-ir", "onnxscript"),
    }.items():
        missing = [package for package in packages if versions[package] is None]
        if missing:
            findings.append(
                Finding(
                    f"extra {extra}",
                    "note",
                    f"{', '.join(missing)} not installed",
                    f"pip install 'loradeploy[{extra}]' to {extra} here",
                )
            )
        else:
            findings.append(Finding(f"extra {extra}", "ok", "installed"))
    return findings


def _threads() -> Finding:
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else cores
    if usable < cores:
        return Finding(
            "threads",
            "note",
            f"{usable} of {cores} cores may be used by this process",
            "set intra_op_num_threads in session_options to that number",
        )
    return Finding("threads", "ok", f"{cores} cores")
