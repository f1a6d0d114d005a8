"""Fixtures shared by the tests of whole parity checks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import loradeploy as ld
from loradeploy.parity.report.results import ParityReport
from tests.conftest import MakeAdapter, once

# Few, to be fast, and of different lengths, so that a batch is padded.
PROMPTS = ["The capital of France is", "Hi", "def f(x):\n    return x +", "Shares fell as 日本"]
Check = Callable[..., ParityReport]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# For tests of builds of onnxruntime that have CUDA, on machines where it does not start.
without_cuda = pytest.mark.skipif(
    CUDA not in onnxruntime.get_available_providers()
    or any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/dxg")),
    reason="needs an onnxruntime with CUDA on a machine without it",
)


@pytest.fixture(scope="session")
def llama_with_adapter(
    tiny_llama_bundle: Path, tiny_llama: Path, make_adapter: MakeAdapter, shared: Path
) -> Path:
    """The tiny Llama's bundle with the adapter "one"."""
    adapter = make_adapter(tiny_llama, seed=1)
    return once(
        shared / "bundle-llama-one",
        lambda place: ld.export(tiny_llama_bundle, place, adapters={"one": adapter}),
    )


@pytest.fixture
def llama_bundle(llama_with_adapter: Path, tmp_path: Path) -> Path:
    """A copy of `llama_with_adapter` that a test may modify."""
    return Path(shutil.copytree(llama_with_adapter, tmp_path / "bundle"))


@pytest.fixture
def llama_in_form(llama_with_adapter: Path, shared: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function (name, **options of the export) → a bundle as `llama_bundle`, in this form."""

    def export(name: str, **options: Any) -> Path:
        adapters = {"one": llama_with_adapter / "adapters" / "one"}
        made = once(
            shared / f"bundle-llama-one-{name}",
            lambda place: ld.export(llama_with_adapter, place, adapters=adapters, **options),
        )
        return Path(shutil.copytree(made, tmp_path / "bundle"))

    return export


@pytest.fixture
def check(tiny_llama: Path) -> Check:
    """A function that runs `loradeploy.parity` on a bundle of the tiny Llama, with few prompts."""

    def run(bundle: Path, **options: Any) -> ParityReport:
        quick = {"prompts": PROMPTS, "tokens": 3, "certificate": False, "shrink": False}
        return ld.parity(bundle, model=tiny_llama, **{**quick, **options})

    return run
