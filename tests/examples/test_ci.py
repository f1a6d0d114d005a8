"""The CI examples match their README, and every command in them works."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conftest import ROOT, MakeAdapter
from tests.parity.graphs import token_model

CI = ROOT / "examples" / "ci"
README = (CI / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def desk(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A directory with an adapter and its model, named as in the README."""
    place = tmp_path_factory.mktemp("ci")
    (place / "SmolLM2-135M-Instruct").symlink_to(tiny_llama)
    make_adapter(tiny_llama, seed=1, out=place / "adapters" / "headline")
    return place


def run(desk: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        command,
        cwd=desk,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def workflow() -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load((CI / "parity.yml").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def bundle(desk: Path) -> Path:
    """The bundle made by the steps of the workflow, without the installation."""
    summary = desk / "summary.md"
    model = {"MODEL": "SmolLM2-135M-Instruct", "GITHUB_STEP_SUMMARY": str(summary)}
    scripts = [step["run"] for step in workflow()["jobs"]["parity"]["steps"] if "run" in step]
    install, *scripts = scripts
    assert install.startswith("pip install")
    for script in scripts:
        done = run(desk, "bash", "-eo", "pipefail", "-c", script, **model)
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return desk / "bundle"


def test_the_workflow_checks_the_bundle_and_uploads_its_reports(desk: Path, bundle: Path) -> None:
    assert "parity passed" in (desk / "summary.md").read_text(encoding="utf-8")
    kept = {file.name for file in (desk / "parity").iterdir()}
    assert kept == {"parity.md", "parity.xml", "parity.html", "parity.json"}
    uploads = [s["with"] for s in workflow()["jobs"]["parity"]["steps"] if "upload" in str(s)]
    assert uploads[0]["path"] == "parity/"


def test_the_workflow_fails_if_the_check_fails(desk: Path, bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (prove,) = (
        step["run"] for step in workflow()["jobs"]["parity"]["steps"] if step.get("name") == "Prove"
    )
    data = broken / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x00")
    model = {"MODEL": str(desk / "SmolLM2-135M-Instruct")}
    assert run(tmp_path, "bash", "-eo", "pipefail", "-c", prove, **model).returncode == 2


def test_the_hook_refuses_a_bundle_that_changed_since_the_check(
    desk: Path, bundle: Path, tmp_path: Path
) -> None:
    text = (CI / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (hook,) = yaml.safe_load(text)["repos"][0]["hooks"]
    shutil.copy(CI / "check_certificates.py", desk)
    command = shlex.split(hook["entry"])
    files = [str(f.relative_to(desk)) for f in bundle.rglob("*") if f.is_file()]
    committed = [file for file in files if re.search(hook["files"], file)]
    assert {Path(file).name for file in committed} >= {"loradeploy.json", "parity.json"}
    assert run(desk, *command, *committed).returncode == 0
    assert run(desk, *command, "adapters/headline/adapter_model.safetensors").returncode == 0
    broken = Path(shutil.copytree(bundle, desk / "broken"))
    (broken / "model.onnx").write_bytes((broken / "model.onnx").read_bytes() + b"\x00")
    done = run(desk, *command, "broken/model.onnx", *committed)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith("broken: parity stale: ")


def test_the_tests_of_the_example_pass(desk: Path, bundle: Path) -> None:
    plugin = ("-p", "no:loradeploy", "-p", "loradeploy.parity.pytest_plugin")
    file = str(CI / "test_parity_example.py")
    environment = {"MODEL": "SmolLM2-135M-Instruct", "BUNDLE": "bundle"}
    options = ("--rootdir", str(desk), "--parity-report-dir", "reports", "-p", "no:cacheprovider")
    done = run(desk, sys.executable, "-m", "pytest", *plugin, *options, file, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_the_commands_of_the_readme_work(desk: Path, bundle: Path) -> None:
    """Run each line of the `console` blocks in order."""
    for name in ("old.onnx", "new.onnx"):
        token_model(desk / name)
    (desk / "service").mkdir()
    (desk / "service" / "client.py").write_text(
        "from tests.parity.graphs import in_numpy as predict\n"
    )
    (desk / "recorded").mkdir()
    np.savez(desk / "recorded" / "one.npz", input_ids=np.array([[1, 2, 3]]))
    ran = 0
    for text in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        for line in text.splitlines():
            done = run(desk, sys.executable, "-m", *shlex.split(line.removeprefix("$ ")))
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            ran += 1
    assert ran == 3


def test_the_readme_links_to_every_file() -> None:
    linked = set(re.findall(r"\]\(([^)]+)\)", README))
    files = {file.name for file in CI.iterdir() if file.suffix in (".py", ".yml", ".yaml")}
    assert linked == files
