"""The check for GPU machines runs completely without a GPU, on stub libraries."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loradeploy as ld
from loradeploy.runtime.capture.slots import FixedSlots
from loradeploy.runtime.devices import table
from tests.conftest import ROOT, MakeAdapter
from tools import gpu_check
from tools.cuda_placement import StubsUnavailableError, stubs
from tools.gpu_check import ALLOWED, EXACT, SCALES, TASKS, wrong, wrong_captured


@pytest.fixture(scope="module")
def report(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report for the graph form of --target cuda."""
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
    assert "numbers and times are meaningless" in child.stdout
    found: dict[str, Any] = json.loads((output / "gpu.json").read_text(encoding="utf-8"))
    return found


def test_the_check_runs_completely_and_writes_one_json(report: dict[str, Any]) -> None:
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
    # The stubs compute nothing, so it must not pass.
    cuda = report["forms"]["cuda"]["cuda"]
    assert not cuda["parity"]["passed"] and wrong(cuda)


def test_captured_runs_with_other_results_fail_on_a_device(report: dict[str, Any]) -> None:
    found = report["forms"]["cuda"]
    usual, captured = found["cuda"], found["cuda_captured"]
    # The stubs compute nothing: the results of a device are simulated.
    assert captured["replays"].keys() == {"base", *TASKS, "mixed"}
    right = {
        name: {"error": 1e-5, "effect": 0.0 if name == "base" else 4.0}
        for name in captured["replays"]
    }
    good = {**captured, "replays": right, "texts": usual["texts"]}
    assert wrong_captured(good, usual, True) == []
    assert wrong_captured({**good, "texts": ["other"]}, usual, True) == ["other texts than without"]
    assert wrong_captured({**captured, "graphs": 0}, usual, False) == ["no run was captured"]
    # Without a cache in place there are no texts, so the logits must show the difference.
    alone = {name: value for name, value in good.items() if name != "texts"}
    assert wrong_captured(alone, usual, True) == []
    stale = {**alone, "replays": {**right, "headline": {"error": 3.9, "effect": 4.0}}}
    assert wrong_captured(stale, usual, True) == [
        "headline: the logits of replayed runs are off by 3.9, the adapters change 4"
    ]
    nan = {**alone, "replays": {**right, "mixed": {"error": float("nan"), "effect": 4.0}}}
    assert len(wrong_captured(nan, usual, True)) == 1
    still = {name: {"error": 0.0, "effect": 0.0} for name in right}
    found_still = wrong_captured({**alone, "replays": still}, usual, True)
    assert found_still == ["the adapters change nothing"]


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the CPU provider in place of CUDA, and treat it as one that can record runs."""
    row = dataclasses.replace(table.BY_FULL_NAME[table.CPU], recording={"records": "1"})
    monkeypatch.setitem(table.BY_FULL_NAME, table.CPU, row)
    monkeypatch.setattr(gpu_check, "CUDA", table.CPU)
    monkeypatch.setattr(gpu_check, "TASKS", ("one", "two"))


@pytest.fixture(params=["grows", "in place"])
def bundle(request: pytest.FixtureRequest, llama_with_two: Path, tmp_path: Path) -> Path:
    if request.param == "grows":
        return llama_with_two
    adapters = {name: llama_with_two / "adapters" / name for name in ("one", "two")}
    ld.export(
        llama_with_two, tmp_path / "in-place", adapters=adapters, attention="gqa", layout="rows"
    )
    return tmp_path / "in-place"


@pytest.fixture(scope="module")
def llama_with_two(
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    adapters = {"one": make_adapter(tiny_llama), "two": make_adapter(tiny_llama, r=8, seed=2)}
    place = tmp_path_factory.mktemp("two") / "bundle"
    ld.export(tiny_llama_bundle, place, adapters=adapters)
    return place


def test_replays_are_compared_with_the_same_runs_without_recording(
    bundle: Path, recording: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = SCALES["tiny"]
    with ld.AdapterSession(bundle) as usual:
        with ld.AdapterSession(bundle, ["cpu"], capture_graphs=True) as session:
            right = gpu_check.replayed(session, usual, scale)
            assert session.captured == 3  # the base, an adapter of rank 8 or less, a mixed batch
        assert wrong_captured({"graphs": 3, "replays": right}, {}, True) == []
        assert right["one"]["effect"] > 0.1 and right["base"]["effect"] == 0

        # Write slots only once.
        fill = FixedSlots._fill
        written: set[int] = set()

        def once(self: Any, own: Any, wanted: Any) -> None:
            if id(own) not in written:
                written.add(id(own))
                fill(self, own, wanted)

        monkeypatch.setattr(FixedSlots, "_fill", once)
        with ld.AdapterSession(bundle, ["cpu"], capture_graphs=True) as session:
            stale = gpu_check.replayed(session, usual, scale)
    failures = wrong_captured({"graphs": 3, "replays": stale}, {}, True)
    assert [line.partition(":")[0] for line in failures] == ["two"]
