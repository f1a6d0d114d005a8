"""`doctor` detects broken installations, simulated with real package metadata."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from loradeploy.runtime.devices.environment import examine, files_package
from loradeploy.runtime.devices.findings import Finding, provider_findings
from loradeploy.runtime.devices.starting import TINY_GRAPH
from loradeploy.runtime.devices.table import KNOWN, SOFTWARE_ADAPTER
from tests.parity.conftest import without_cuda

REAL = onnxruntime.__version__


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """An empty site directory that precedes the real one on the path."""
    return tmp_path / "site"


def install(site: Path, name: str, version: str, requires: Sequence[str] = ()) -> None:
    place = site / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    (place / "METADATA").write_text("\n".join(lines) + "\n")


def doctor(site: Path, **environment: str) -> tuple[int, list[dict[str, str]]]:
    done = subprocess.run(
        [sys.executable, "-m", "loradeploy", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(site), **environment},
    )
    if SOFTWARE_ADAPTER not in environment:  # with it, the driver's library writes to stderr
        assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def the(findings: list[dict[str, str]], **wanted: str) -> dict[str, str]:
    (found,) = [f for f in findings if all(f[key] == value for key, value in wanted.items())]
    return found


def test_the_doctor_finds_no_problem_in_this_environment(site: Path) -> None:
    status, findings = doctor(site)
    problems = [finding for finding in findings if finding["status"] == "problem"]
    assert (status, problems) == (0, [])
    assert {f["name"] for f in findings} >= {"python", "numpy", "one onnxruntime", "model cache"}


@pytest.mark.parametrize("other", ["onnxruntime", "onnxruntime-directml", "onnxruntime-openvino"])
def test_the_doctor_detects_two_onnxruntime_packages(other: str, site: Path) -> None:
    for name in (other, "onnxruntime-gpu"):
        install(site, name, REAL)
    install(site, "some-plugin", "1.0", requires=["onnxruntime>=1.20", "numpy"])
    install(site, "some-extra", "1.0", requires=['onnxruntime; extra == "cpu"'])
    status, findings = doctor(site)
    problem = the(findings, status="problem")
    assert status == 1
    assert "overwrite each other" in problem["detail"]
    assert f"the files are {files_package()}'s now" in problem["detail"]
    assert ("some-plugin asks for onnxruntime" in problem["detail"]) == (other == "onnxruntime")
    assert "some-extra" not in problem["detail"]
    assert "pip uninstall onnxruntime" in problem["advice"]
    assert other in problem["advice"]
    assert "--no-deps" in problem["advice"]


@pytest.mark.skipif(sys.platform == "win32", reason="makes symbolic links")
def test_the_doctor_detects_files_overwritten_by_another_package_of_the_same_version(
    site: Path,
) -> None:
    """Without its metadata, as after installing both packages and removing one."""
    (real,) = onnxruntime.__path__
    fake = site / "onnxruntime"
    (fake / "capi").mkdir(parents=True)
    for folder, place in ((Path(real), fake), (Path(real) / "capi", fake / "capi")):
        for file in folder.iterdir():
            if not (place / file.name).exists():
                (place / file.name).symlink_to(file)
    info = fake / "capi" / "build_and_package_info.py"
    content = info.read_text()
    info.unlink()
    info.write_text(content.replace(f"'{files_package()}'", "'onnxruntime-other'"))
    status, findings = doctor(site)
    problem = the(findings, name="one onnxruntime")
    assert (status, problem["status"]) == (1, "problem")
    assert "its files were overwritten by onnxruntime-other's" in problem["detail"]
    assert "onnxruntime-other" in problem["advice"]


def test_the_doctor_detects_files_of_another_onnxruntime_version(site: Path) -> None:
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


def test_the_doctor_detects_a_package_that_is_too_old(site: Path) -> None:
    install(site, "transformers", "4.40.0")
    status, findings = doctor(site)
    problem = the(findings, status="problem")
    assert (status, problem["name"]) == (1, "transformers")
    assert problem["advice"] == "pip install 'transformers>=5'"


def test_the_doctor_detects_two_versions_of_cuda(site: Path) -> None:
    install(site, "torch", "2.13.0+cu118")
    status, findings = doctor(site)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built without CUDA")
    note = the(findings, name="CUDA of torch")
    assert (status, note["status"]) == (0, "note")
    assert "torch is built for CUDA 11" in note["detail"]


def test_the_doctor_reports_that_models_cannot_be_downloaded(site: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = {"HF_HOME": str(tmp_path / "file"), "HF_HUB_OFFLINE": ""}
    assert "cannot be written" in the(doctor(site, **home)[1], name="model cache")["detail"]
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert "HF_HUB_OFFLINE" in the(doctor(site, **offline)[1], name="model cache")["detail"]


# -- execution providers -----------------------------------------------------------------------


def machine(root: Path, *files: str) -> Path:
    """Write a simulated file system root with `files`."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def provider(name: str, root: Path) -> Finding:
    (found,) = [f for f in provider_findings(root) if f.name == f"provider {name}"]
    return found


@without_cuda
def test_without_a_gpu_there_is_a_note_about_cuda_but_not_about_tensorrt(tmp_path: Path) -> None:
    names = [finding.name for finding in provider_findings(tmp_path)]
    assert provider("cuda", tmp_path).status == "note"
    assert "provider tensorrt" not in names


@without_cuda
@pytest.mark.parametrize("driver", ["dev/nvidiactl", "usr/lib/wsl/lib/libcuda.so.1"])
def test_with_a_driver_and_no_cuda_toolkit_the_missing_library_and_its_package_are_named(
    driver: str, tmp_path: Path
) -> None:
    found = provider("cuda", machine(tmp_path, driver))
    assert found.status == "problem"
    assert re.search(r"does not start: lib\w+\.so\.\d+: cannot open shared object", found.detail)
    assert "onnxruntime-gpu[cuda,cudnn]" in found.advice


def test_the_cpu_starts_and_missing_providers_are_listed_with_their_packages(
    tmp_path: Path,
) -> None:
    assert provider("cpu", tmp_path).status == "ok"
    others = provider_findings(tmp_path)[-1]
    listed = dict(re.findall(r"([\w-]+) \(([\w-]+)\)", others.detail))
    shown = {f.name.removeprefix("provider ") for f in provider_findings(tmp_path)}
    assert listed["migraphx"] == "onnxruntime-migraphx"
    assert {row.name for row in KNOWN} - shown - {"tensorrt"} == set(listed) - {"tensorrt"}


@pytest.mark.skipif(find_spec("onnxruntime_ep_webgpu") is None, reason="the plugin is not there")
@pytest.mark.parametrize("software", [False, True])
def test_a_plugin_without_a_device_is_a_note_with_advice(software: bool, site: Path) -> None:
    """Without a driver a software adapter is listed but does not start."""
    allow = {SOFTWARE_ADAPTER: "1" if software else "", "VK_ICD_FILENAMES": "/no/driver.json"}
    _, findings = doctor(site, **allow)
    found = the(findings, name="provider webgpu")
    if found["status"] == "ok":
        pytest.skip("there is a GPU")
    assert found["status"] == ("problem" if software else "note")
    assert "onnxruntime-ep-webgpu" in found["detail"]
    assert SOFTWARE_ADAPTER in found["advice"]


@pytest.mark.parametrize(
    "files",
    [
        {"sys/fs/cgroup/cpu.max": "50000 100000\n"},
        {
            "proc/self/cgroup": "0::/pods/one\n",
            "sys/fs/cgroup/pods/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/pods/one/cpu.max": "max 100000\n",
        },
        {
            "proc/self/cgroup": "2:memory:/elsewhere\n1:cpuacct,cpu:/pods\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/pods/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/pods/cpu.cfs_period_us": "100000\n",
        },
    ],
    ids=["its own", "of a group around it", "version 1"],
)
def test_a_container_with_less_than_a_core_is_noted(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (threads,) = [finding for finding in examine(tmp_path) if finding.name == "threads"]
    assert threads.status == "note"
    assert "0.5 of " in threads.detail


def test_every_problem_and_note_has_advice(site: Path) -> None:
    install(site, "onnxruntime", "1.2.3")
    _, findings = doctor(site)
    for finding in findings:
        assert finding["status"] == "ok" or finding["advice"], finding


def test_the_graph_for_testing_providers_is_valid() -> None:
    session = onnxruntime.InferenceSession(TINY_GRAPH, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones(1, np.float32)})
    assert y.tolist() == [-1.0]
