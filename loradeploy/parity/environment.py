"""The machine and package versions of a check, for its certificate."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Final

from loradeploy.bundle.proof.provider import ProviderFacts
from loradeploy.parity.report.results import Environment
from loradeploy.runtime.devices.facts import processor
from loradeploy.runtime.devices.table import KNOWN

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


def environment(providers: tuple[ProviderFacts, ...]) -> Environment:
    """Describe this machine and its packages; `providers`: those that the check ran on."""
    versions = {"python": platform.python_version()}
    plugins = [row.plugin.package for row in KNOWN if row.plugin is not None]
    for package in (*_PACKAGES, *plugins):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Environment(
        versions=versions,
        platform={
            "system": platform.platform(),
            "machine": platform.machine(),
            "processor": processor(),
            "cores": str(os.cpu_count()),
        },
        providers=providers,
    )
