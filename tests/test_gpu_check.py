"""The check for machines with a GPU runs to its end without one, on stub libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tools.cuda_placement import StubsUnavailableError, stubs
from tools.gpu_check import ALLOWED, EXACT, TASKS, wrong, wrong_captured


@pytest.fixture(scope="module")
def report(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What it wrote for the form of --target cuda."""
    try:
        stubs()
    except StubsUnavailableError as problem:
        pytest.skip(str(problem))
    output = tmp_path_factory.mktemp("gpu")
    arguments = ["--stubs", "--scale", "tiny", "--form", "cuda", "--model", str(tiny_llama)]
    child = subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", *arguments, "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-2000:]
    assert "its numbers and times mean nothing" in child.stdout
    found: dict[str, Any] = json.loads((output / "gpu.json").read_text(encoding="utf-8"))
    return found


def test_it_runs_the_whole_way_and_writes_one_json(report: dict[str, Any]) -> None:
    assert report["passed"] and report["stubs"] and report["failures"] == []
    assert report["machine"]["device"] == "stub libraries"
    assert list(report["training"]) == list(TASKS)
    found = report["forms"]["cuda"]
    assert found["placement"]["cuda_graph"] == {"accepted": True, "reason": None}
    assert found["placement"]["copies"] == 0
    assert {row["op"] for row in found["placement"]["cpu"]} <= ALLOWED.keys()
    for provider, full in (("cpu", "CPU"), ("cuda", "CUDA")):
        own = found[provider]
        assert own["running"][0] == f"{full}ExecutionProvider"
        assert len(own["texts"]) == 6
        for batch in ("batch 1", "batch 2"):
            names = {row["name"] for row in own["decode_and_swap"][batch]}
            assert {"base", "base again (control)", "swap at each call"} <= names
            assert own["prefill_ms"][batch].keys() == {"base", *TASKS}
    assert found["cpu"]["parity"]["passed"]
    assert found["cuda_captured"]["graphs"] > 0


def test_parity_on_cuda_computes_float32(report: dict[str, Any]) -> None:
    assert EXACT == {"use_tf32": "0"}
    assert report["forms"]["cuda"]["cuda"]["options"]["use_tf32"] == "0"
    # What computes nothing does not pass.
    cuda = report["forms"]["cuda"]["cuda"]
    assert not cuda["parity"]["passed"] and wrong(cuda)


def test_captured_runs_that_say_something_else_fail_on_a_device(report: dict[str, Any]) -> None:
    found = report["forms"]["cuda"]
    usual, captured = found["cuda"], found["cuda_captured"]
    assert wrong_captured({**captured, "texts": usual["texts"]}, usual, True) == []
    other = {**captured, "texts": ["other"] * len(usual["texts"])}
    assert wrong_captured(other, usual, True) == ["other texts than without"]
    assert wrong_captured({**captured, "graphs": 0}, usual, False) == ["no run was captured"]
