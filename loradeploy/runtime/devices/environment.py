"""Examine the installed packages and the machine for known problems."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path
from typing import Final

from loradeploy.errors import listed_names
from loradeploy.paths import expanded
from loradeploy.runtime.devices import cgroups
from loradeploy.runtime.devices.findings import (
    Finding,
    has_nvidia_device,
    machine_root,
    provider_findings,
)
from loradeploy.runtime.devices.table import CUDA, PACKAGES

_PACKAGES: Final = (
    "loradeploy", "numpy", "onnxruntime-gpu", "onnxruntime", "safetensors", "tokenizers",
    "torch", "transformers", "accelerate", "onnx", "onnx-ir", "onnxscript", "peft",
    "onnxruntime-genai",
)  # fmt: skip


def examine(root: Path | None = None) -> list[Finding]:
    """Examine this Python, its packages, onnxruntime's providers, and known problems.

    `root`: the root directory of the machine's files, such as dev/nvidiactl.
    """
    root = machine_root() if root is None else root
    versions = {name: _version(name) for name in _PACKAGES}
    findings = [Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")]
    findings += [
        Finding(name, "ok", version) for name, version in versions.items() if version is not None
    ]
    findings += _too_old()
    findings.append(_one_onnxruntime())
    findings += _onnxruntime(versions["torch"], root)
    findings += _extras(versions)
    findings.append(_threads(root))
    findings.append(_model_cache())
    return findings


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _too_old() -> list[Finding]:
    """Installed packages that are older than loradeploy requires."""
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
    """The first numbers of a version, for comparisons."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _one_onnxruntime() -> Finding:
    """Whether exactly one distribution of ONNX Runtime is installed, with its own files."""
    name = "one onnxruntime"
    found = [package for package in PACKAGES if _version(package) is not None]
    if not found:
        return Finding(name, "problem", "none is installed", "pip install loradeploy")
    written = files_package()
    if len(found) == 1 and written in (None, found[0]):
        return Finding(name, "ok", found[0])
    all_named = dict.fromkeys([*found, *([written] if written else [])])
    asking = _asking_for("onnxruntime") if "onnxruntime" in (*found, written) else []
    because = f"; {listed_names(asking)} asks for onnxruntime" if asking else ""
    if len(found) == 1:
        detail = f"{found[0]} is installed, and its files were overwritten by {written}'s{because}"
    else:
        there = "" if written is None else f": the files are {written}'s now"
        detail = f"{' and '.join(found)} are both installed and overwrite each other's files{there}"
        detail += because
    return Finding(
        name,
        "problem",
        detail,
        f"pip uninstall {' '.join(all_named)}, then install the one you need"
        " with --force-reinstall; beside onnxruntime-gpu, plugins that ask for onnxruntime are"
        " installed with --no-deps, and onnxruntime-genai goes into an environment of its own",
    )


def files_package() -> str | None:
    """The distribution that wrote the files of the imported onnxruntime; None if unknown."""
    spec = importlib.util.find_spec("onnxruntime")
    for place in spec.submodule_search_locations or () if spec is not None else ():
        file = Path(place) / "capi" / "build_and_package_info.py"
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            if named := re.search(r"""package_name\s*=\s*['"]([\w.-]+)['"]""", text):
                return named[1]
    return None


def _asking_for(package: str) -> list[str]:
    """The installed distributions that require `package` on any machine."""
    found = set()
    for distribution in importlib.metadata.distributions():
        for line in distribution.requires or ():
            requirement, _, marker = line.partition(";")
            asked = re.match(r"[\w.-]+", requirement.strip())
            if asked and asked[0].lower() == package and not marker:
                found.add(str(distribution.metadata["Name"]))
    return sorted(found)


def _onnxruntime(torch: str | None, root: Path) -> list[Finding]:
    """Whether onnxruntime can be imported, and which of its providers start."""
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
    findings += provider_findings(root)
    if CUDA in onnxruntime.get_available_providers():
        findings += _one_cuda(torch, root)
    return findings


def _one_cuda(torch: str | None, root: Path) -> list[Finding]:
    """Whether torch and onnxruntime, which share CUDA libraries, use the same major version."""
    build = re.search(r"\+(cpu|cu(\d+)\d)$", torch or "")
    theirs = build[2] if build else None
    try:
        from onnxruntime.capi.build_and_package_info import cuda_version
    except ImportError:  # a build without CUDA, or with another layout
        return []
    ours = str(cuda_version).partition(".")[0]
    if build and build[1] == "cpu" and has_nvidia_device(root):
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


def _threads(root: Path) -> Finding:
    cores = os.cpu_count() or 1
    usable = float(len(os.sched_getaffinity(0))) if sys.platform == "linux" else cores
    allowed = min(usable, cgroups.cores(root) or usable)
    if allowed < cores:
        return Finding(
            "threads",
            "note",
            f"{allowed:g} of {cores} cores may be used by this process, and onnxruntime starts a"
            " thread for each that it sees",
            f"set session_options.intra_op_num_threads to {max(1, int(allowed))}",
        )
    return Finding("threads", "ok", f"{cores} cores")


def _model_cache() -> Finding:
    """The directory of downloaded models, and whether models can be downloaded."""
    name = "model cache"
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    home = expanded(os.environ.get("HF_HOME", default))
    cache = expanded(os.environ.get("HF_HUB_CACHE", home / "hub"))
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding(
            name,
            "note",
            f"HF_HUB_OFFLINE is set: Hugging Face ids are only looked up in {cache}",
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
