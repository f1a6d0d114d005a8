"""Where a check ran, for its certificate."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Final

from loradeploy.parity.report.results import Environment

_PACKAGES: Final = (
    "loradeploy",
    "torch",
    "transformers",
    "peft",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx-ir",
    "numpy",
)


def environment(providers: tuple[str, ...] | None) -> Environment:
    """This machine and its packages; `providers` are those that the check asked for."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Environment(
        versions=versions,
        platform={
            "system": platform.platform(),
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": str(os.cpu_count()),
        },
        providers=providers or ("CPUExecutionProvider",),
    )


def _processor() -> str:
    """The processor's model, which Linux tells in a file of its own."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
