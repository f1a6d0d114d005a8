"""What is installed, what runs, and the traps that are known."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from loradeploy.errors import first_line
from loradeploy.runtime.devices.plugins import TINY_GRAPH
from loradeploy.runtime.devices.providers import preload_cuda
from loradeploy.runtime.devices.table import PACKAGES

Status = Literal["ok", "note", "problem"]

_PACKAGES: Final = (
    "loradeploy", "numpy", "onnxruntime-gpu", "onnxruntime", "safetensors", "tokenizers",
    "torch", "transformers", "accelerate", "onnx", "onnx-ir", "onnxscript", "peft",
    "onnxruntime-genai",
)  # fmt: skip
_WARNINGS, _NOTHING_LOGGED = 2, 4  # onnxruntime's log severities
_CUDA: Final = "CUDAExecutionProvider"
# Of control groups, version 2 and 1: the processor time of a container, and for which period.
_QUOTAS: Final = (
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
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
    findings += _too_old()
    findings.append(_one_onnxruntime())
    findings += _onnxruntime(versions["torch"])
    findings += _extras(versions)
    findings.append(_threads())
    findings.append(_model_cache())
    return findings


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _too_old() -> list[Finding]:
    """Packages that are there, older than loradeploy asks for."""
    try:
        required = importlib.metadata.requires("loradeploy") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return []
    findings = {}
    for line in required:
        least = re.match(r"([\w.-]+)>=([\d.]+)", line)
        installed = _version(least[1]) if least else None
        if least and installed is not None and _numbers(installed) < _numbers(least[2]):
            findings[least[1]] = Finding(
                least[1],
                "problem",
                f"version {installed} is older than loradeploy works with",
                f"pip install '{least[1]}>={least[2]}'",
            )
    return list(findings.values())


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, as many as compare."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _one_onnxruntime() -> Finding:
    name = "one onnxruntime"
    found = [package for package in PACKAGES if _version(package) is not None]
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


def _onnxruntime(torch: str | None) -> list[Finding]:
    """What the onnxruntime that is imported says of itself, and whether CUDA starts in it."""
    try:
        import onnxruntime
    except ImportError as problem:
        reason = " ".join(str(problem).split())
        advice = "pip install --force-reinstall the one onnxruntime that you need"
        return [Finding("onnxruntime", "problem", f"cannot be imported: {reason}", advice)]
    findings = []
    installed = [_version(package) for package in PACKAGES]
    if onnxruntime.__version__ not in installed:
        findings.append(
            Finding(
                "onnxruntime's files",
                "problem",
                f"are of version {onnxruntime.__version__}, and the package that is installed is"
                f" {next(filter(None, installed), 'none')}: another one has overwritten them",
                "pip install --force-reinstall the one onnxruntime that you need",
            )
        )
    available = onnxruntime.get_available_providers()
    findings.append(Finding("providers in this build", "ok", ", ".join(available)))
    if _CUDA in available:
        findings.append(_cuda(onnxruntime))
        findings += _one_cuda(onnxruntime, torch)
    return findings


def _cuda(onnxruntime: Any) -> Finding:
    """Whether the CUDA provider starts: it is listed wherever it is compiled in."""
    if not _has_nvidia_device():
        return Finding(
            "CUDA",
            "note",
            "onnxruntime could use it, and there is no NVIDIA device here",
            "nothing to do where the CPU is meant to run it",
        )
    preload_cuda()
    onnxruntime.set_default_logger_severity(_NOTHING_LOGGED)  # the finding says it
    try:
        session = onnxruntime.InferenceSession(TINY_GRAPH, providers=[_CUDA])
        if _CUDA in session.get_providers():
            return Finding("CUDA", "ok", "there is a device, and the provider starts on it")
        why = _unloadable(onnxruntime)
    except Exception as problem:  # onnxruntime's exceptions share no base but this
        why = first_line(problem)
    finally:
        onnxruntime.set_default_logger_severity(_WARNINGS)
    return Finding(
        "CUDA",
        "problem",
        f"there is a device, and the provider does not start: {why}",
        "pip install 'onnxruntime-gpu[cuda,cudnn]' for the CUDA and cuDNN libraries that this"
        " build wants, and see that the driver is new enough (nvidia-smi)",
    )


def _unloadable(onnxruntime: Any) -> str:
    """Which library the CUDA provider misses, in the loader's words."""
    windows = sys.platform == "win32"
    file = "onnxruntime_providers_cuda.dll" if windows else "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(Path(onnxruntime.__file__).parent / "capi" / file))
    except OSError as problem:
        return " ".join(str(problem).split())
    return "its libraries load, the device does not answer"


def _one_cuda(onnxruntime: Any, torch: str | None) -> list[Finding]:
    """torch and onnxruntime in one process share CUDA libraries, of one major version."""
    build = re.search(r"\+(cpu|cu(\d+)\d)$", torch or "")
    theirs = build[2] if build else None
    try:
        from onnxruntime.capi.build_and_package_info import cuda_version
    except ImportError:  # a build without CUDA, or of another layout
        return []
    ours = str(cuda_version).partition(".")[0]
    if build and build[1] == "cpu" and _has_nvidia_device():
        return [
            Finding(
                "CUDA of torch",
                "note",
                "there is a device, but torch is a CPU build",
                "install a CUDA build of torch to train on the device",
            )
        ]
    if theirs is None or theirs == ours:
        return []
    return [
        Finding(
            "CUDA of torch",
            "note",
            f"torch is built for CUDA {theirs}, onnxruntime for CUDA {ours}: in one process the"
            " second that starts may find the other's libraries",
            f"install a torch for CUDA {ours}, or train and serve in environments of their own",
        )
    ]


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
    usable = float(len(os.sched_getaffinity(0))) if sys.platform == "linux" else cores
    allowed = min(usable, _quota() or usable)
    if allowed < cores:
        return Finding(
            "threads",
            "note",
            f"{allowed:g} of {cores} cores may be used by this process, and onnxruntime starts a"
            " thread for each that it sees",
            f"set session_options.intra_op_num_threads to {max(1, int(allowed))}",
        )
    return Finding("threads", "ok", f"{cores} cores")


def _quota() -> float | None:
    """The cores that a container may use, None without a limit."""
    for files in _QUOTAS:
        try:
            words = " ".join(Path(file).read_text(encoding="utf-8") for file in files).split()
            quota, period = int(words[0]), int(words[1])
        except (OSError, ValueError, IndexError):  # no such file, or "max"
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None


def _model_cache() -> Finding:
    """Where Hugging Face ids are looked up, and whether they can be fetched."""
    name = "model cache"
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    home = Path(os.environ.get("HF_HOME", default)).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding(
            name,
            "note",
            f"HF_HUB_OFFLINE is set: Hugging Face ids are looked up in {cache} alone",
            "unset it to fetch models, or give directories",
        )
    there = next(path for path in (cache, *cache.parents) if path.exists())
    if not os.access(there, os.W_OK) or not there.is_dir():
        return Finding(
            name,
            "note",
            f"{cache} cannot be written: no model can be fetched by its id",
            "set HF_HOME to a directory of your own, or give directories",
        )
    return Finding(name, "ok", str(cache))
