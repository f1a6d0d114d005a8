"""`doctor` sees the traps: real metadata of distributions that are not there."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from loradeploy.runtime.devices.plugins import TINY_GRAPH

REAL = onnxruntime.__version__


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory of installed distributions, to be filled; it stands before the real ones."""
    return tmp_path / "site"


def install(site: Path, name: str, version: str) -> None:
    place = site / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def doctor(site: Path, **environment: str) -> tuple[int, list[dict[str, str]]]:
    done = subprocess.run(
        [sys.executable, "-m", "loradeploy", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(site), **environment},
    )
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def the(findings: list[dict[str, str]], **wanted: str) -> dict[str, str]:
    (found,) = [f for f in findings if all(f[key] == value for key, value in wanted.items())]
    return found


def test_the_doctor_is_content_here(site: Path) -> None:
    status, findings = doctor(site)
    problems = [finding for finding in findings if finding["status"] == "problem"]
    assert (status, problems) == (0, [])
    assert {f["name"] for f in findings} >= {"python", "numpy", "one onnxruntime", "model cache"}


@pytest.mark.parametrize("other", ["onnxruntime", "onnxruntime-directml", "onnxruntime-openvino"])
def test_the_doctor_sees_two_onnxruntimes(other: str, site: Path) -> None:
    for name in (other, "onnxruntime-gpu"):
        install(site, name, REAL)
    status, findings = doctor(site)
    problem = the(findings, status="problem")
    assert status == 1
    assert "overwrite each other" in problem["detail"]
    assert "pip uninstall onnxruntime" in problem["advice"]
    assert other in problem["advice"]


def test_the_doctor_sees_files_of_another_onnxruntime(site: Path) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        if (name == "onnxruntime-gpu") == on_gpu_package():
            install(site, name, "1.2.3")
    status, findings = doctor(site)
    problem = the(findings, name="onnxruntime's files")
    assert (status, problem["status"]) == (1, "problem")
    assert REAL in problem["detail"]
    assert "1.2.3" in problem["detail"]
    assert "--force-reinstall" in problem["advice"]


def on_gpu_package() -> bool:
    try:
        importlib.metadata.version("onnxruntime-gpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_the_doctor_sees_a_package_that_is_too_old(site: Path) -> None:
    install(site, "transformers", "4.40.0")
    status, findings = doctor(site)
    problem = the(findings, status="problem")
    assert (status, problem["name"]) == (1, "transformers")
    assert problem["advice"] == "pip install 'transformers>=5'"


def test_the_doctor_sees_two_versions_of_cuda(site: Path) -> None:
    install(site, "torch", "2.13.0+cu118")
    status, findings = doctor(site)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built without CUDA")
    note = the(findings, name="CUDA of torch")
    assert (status, note["status"]) == (0, "note")
    assert "torch is built for CUDA 11" in note["detail"]


def test_the_doctor_tells_that_models_cannot_be_fetched(site: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = {"HF_HOME": str(tmp_path / "file"), "HF_HUB_OFFLINE": ""}
    assert "cannot be written" in the(doctor(site, **home)[1], name="model cache")["detail"]
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert "HF_HUB_OFFLINE" in the(doctor(site, **offline)[1], name="model cache")["detail"]


def test_every_problem_and_note_says_what_to_do(site: Path) -> None:
    install(site, "onnxruntime", "1.2.3")
    _, findings = doctor(site)
    for finding in findings:
        assert finding["status"] == "ok" or finding["advice"], finding


def test_the_graph_that_tries_a_provider_is_a_graph() -> None:
    session = onnxruntime.InferenceSession(TINY_GRAPH, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones(1, np.float32)})
    assert y.tolist() == [-1.0]
