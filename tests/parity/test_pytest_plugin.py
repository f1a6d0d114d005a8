"""The pytest plugin, tested in separate pytest runs, and `assert_parity` without it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loradeploy.errors import UsageError
from loradeploy.parity import assert_parity
from loradeploy.parity.report.writers import WRITERS
from tests.conftest import ROOT, MakeAdapter
from tests.parity.graphs import in_numpy, token_model

SUITE = """
def test_same(assert_parity):
    assert_parity("same.onnx", "reference.onnx")

def test_off(assert_parity):
    assert_parity("off.onnx", "reference.onnx")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with two models and a test file."""
    for name, error in (("reference", 0.0), ("same", 0.0), ("off", 0.01)):
        token_model(tmp_path / f"{name}.onnx", error=error)
    (tmp_path / "test_it.py").write_text(SUITE)
    return tmp_path


def run(place: Path, *arguments: str) -> tuple[int, str]:
    """Run pytest in `place` with the plugin loaded once; return exit status and output."""
    # Block the entry point, in case loradeploy is installed, then load the plugin.
    plugin = ("-p", "no:loradeploy", "-p", "loradeploy.parity.pytest_plugin")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *plugin, *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": os.fspath(ROOT), "COLUMNS": "200"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


PASSED, FAILED, USAGE = 0, 1, 4


def test_a_check_that_fails_fails_its_test_and_shows_the_table(place: Path) -> None:
    status, out = run(place)
    assert status == FAILED
    for line in (
        r">       assert_parity\(\"off.onnx\", \"reference.onnx\"\)",
        "E .* 1 parity failures",
        "E .* candidate off.onnx, logits: max abs ",
        "E .* backend .* verdict",
        "=+ parity =+",
        "test_it.py::test_same: parity passed: same.onnx .* against reference.onnx",
        "test_it.py::test_off: parity FAILED: off.onnx .* against reference.onnx",
        "1 failed, 1 passed",
    ):
        assert re.search(line, out), f"{line}\n{out}"
    assert "pytest_plugin.py:" not in out, "the traceback ends in the test"


def test_reports_are_written_for_every_check_from_workers_too(place: Path) -> None:
    _, out = run(place, "--parity-report-dir", "reports", "--parity-seed", "7", "-n", "2")
    assert "report reports/test_it.py-test_same-" in out
    reports = sorted((place / "reports").glob("*.json"))
    result = [json.loads(report.read_text()) for report in reports]
    assert {(t["bundle"], t["passed"], t["inputs"]["seed"]) for t in result} == {
        ("same.onnx", True, 7),
        ("off.onnx", False, 7),
    }
    assert {file.suffix for file in (place / "reports").iterdir()} == set(WRITERS)


def test_baselines_are_written_once_and_later_runs_are_compared_with_them(place: Path) -> None:
    only = ("-k", "test_same", "--parity-baseline", "baselines")
    status, out = run(place, *only)
    assert status == FAILED
    assert "does not exist: run once with --parity-update-baseline" in out
    assert run(place, *only, "--parity-update-baseline")[0] == PASSED
    # Within the limits of a check, but worse than the baseline.
    token_model(place / "same.onnx", error=1.5e-5)
    status, out = run(place, *only)
    assert status == FAILED
    assert re.search("max_abs was .*, now", out), out


def test_a_failing_check_is_not_written_as_a_baseline(place: Path) -> None:
    assert run(place, "--parity-baseline", "kept", "--parity-update-baseline")[0] == FAILED
    assert [name.split("-")[1] for name in os.listdir(place / "kept")] == ["test_same"]


def test_updating_baselines_without_a_directory_is_a_usage_error(place: Path) -> None:
    status, out = run(place, "--parity-update-baseline")
    assert status == USAGE
    assert "--parity-update-baseline needs --parity-baseline DIR" in out


# Runs in a separate interpreter that has imported pytest.
IMPORTED = """
import sys, pytest
before = set(sys.modules)
import loradeploy.parity.pytest_plugin
new = {name.partition('.')[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names) - {'loradeploy'}))
"""


def test_the_plugin_imports_nothing_until_it_is_used() -> None:
    command = [sys.executable, "-c", IMPORTED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# -- without the plugin ------------------------------------------------------------------------


def test_the_assertion_compares_a_bundle_with_pytorch(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter
) -> None:
    given = {"prompts": ["Hi", "Good morning"], "tokens": 2, "certificate": False}
    adapters = [make_adapter(tiny_llama, seed=1)]
    only = {"backends": ["onnx-native"]}
    report = assert_parity(tiny_llama_bundle, tiny_llama, adapters=adapters, **given, **only)
    assert report.mode == "side-inputs"
    assert report.adapters


def test_the_assertion_compares_anything_else(tmp_path: Path) -> None:
    reference = token_model(tmp_path / "reference.onnx")
    assert assert_parity(in_numpy, reference).mode == "compared"
    with pytest.raises(AssertionError, match=r"1 parity failures\n.*max abs(.|\n)*FAILED"):
        assert_parity(
            lambda feeds: {"logits": in_numpy(feeds)["logits"] + np.float32(1)}, reference
        )


def test_the_assertion_needs_a_reference_for_anything_but_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give the reference"):
        assert_parity(token_model(tmp_path / "reference.onnx"))
