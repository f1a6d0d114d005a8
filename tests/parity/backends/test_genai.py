"""onnxruntime-genai as a parity backend, run in a separate interpreter that has it installed."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import pytest

import loradeploy as ld
from loradeploy.adapter.files.peft import load_adapter
from loradeploy.bundle.adapter_inputs.native import write_onnx_adapter
from loradeploy.bundle.manifest import read_manifest
from loradeploy.parity.backends import genai
from loradeploy.parity.checks.mistakes import doubled_alpha
from tests.conftest import ROOT, MakeAdapter
from tests.parity.conftest import Check
from tests.parity.tampering import change_graph, see_the_future_in_chunks

GENAI = ROOT / ".venv-genai" / "bin" / "python"
ONLY = {"backends": ["onnx-genai"]}
with_genai = pytest.mark.skipif(not GENAI.exists(), reason="make setup makes .venv-genai")


@with_genai
def test_the_base_and_an_adapter_agree_in_every_phase_of_the_backend(
    llama_with_adapter: Path, check: Check
) -> None:
    report = check(
        llama_with_adapter, genai_python=GENAI, phases=["prefill", "decode", "chunked-prefill"]
    )
    assert report.passed, report.failures
    seen = {(r.adapter, r.phase) for r in report.results if r.backend == "onnx-genai"}
    phases = ("prefill", "chunked prefill", "decode")
    assert seen == {(adapter, phase) for adapter in (None, "one") for phase in phases}


@with_genai
def test_a_merged_bundle_runs_without_an_adapter(
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    check: Check,
) -> None:
    adapter = make_adapter(tiny_llama, seed=1)
    ld.export(tiny_llama_bundle, tmp_path / "merged", adapters=[adapter], merge=True)
    report = check(tmp_path / "merged", adapters={"one": adapter}, genai_python=GENAI, **ONLY)
    assert report.passed, report.failures
    assert {result.adapter for result in report.results} == {"one"}


@with_genai
def test_a_wrong_adapter_and_a_wrong_mask_fail(
    tiny_llama: Path, llama_bundle: Path, make_adapter: MakeAdapter, check: Check
) -> None:
    wrong = doubled_alpha(load_adapter(make_adapter(tiny_llama, seed=1)))
    assert wrong is not None
    native = llama_bundle / "adapters/one.onnx_adapter"
    write_onnx_adapter(wrong, read_manifest(llama_bundle), native)
    change_graph(llama_bundle, see_the_future_in_chunks)
    report = check(llama_bundle, genai_python=GENAI, **ONLY)
    failed = {(r.adapter, r.phase) for r in report.results if r.outcome == "failed"}
    assert failed == {
        ("one", "prefill"),
        ("one", "chunked prefill"),
        ("one", "decode"),
        (None, "chunked prefill"),
    }


@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is not None, reason="it is installed here"
)
def test_a_missing_installation_is_reported_if_the_backend_is_requested(
    llama_with_adapter: Path, check: Check
) -> None:
    (result,) = check(llama_with_adapter, **ONLY).results
    assert (result.outcome, result.message) == (
        "not run",
        "onnxruntime-genai is not installed: give the Python that has it",
    )
    silent = check(llama_with_adapter, phases=["decode"])
    assert "onnx-genai" not in {result.backend for result in silent.results}


def test_an_encoder_is_not_run_by_this_backend(tiny_bert: Path, tiny_bert_bundle: Path) -> None:
    report = ld.parity(
        tiny_bert_bundle,
        model=tiny_bert,
        prompts=["Hi"],
        genai_python=sys.executable,
        certificate=False,
    )
    (result,) = (r for r in report.results if r.backend == "onnx-genai")
    assert (result.outcome, result.message) == ("not run", "it only runs decoders")


WORKERS = {
    "import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "crash": ("print('{}', flush=True); input(); import sys; sys.exit('out of memory')",
        "the worker ended with status 1: out of memory"),
    "silence": ("input()", "no answer in 1 s"),
    "refusal": ("print('{}', flush=True); input(); print('{\"error\": \"E: no\"}')", "E: no"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WORKERS)
def test_a_failing_worker_process_is_a_failure_with_its_own_message(
    kind: str,
    llama_with_adapter: Path,
    check: Check,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, reported = WORKERS[kind]
    worker = tmp_path / "worker.py"
    worker.write_text(program)
    monkeypatch.setattr(genai, "_WORKER", worker)
    if kind == "silence":
        monkeypatch.setattr(genai, "_OPEN_TIMEOUT", 1.0)
    begin = time.monotonic()
    report = check(llama_with_adapter, genai_python=sys.executable, phases=["prefill"], **ONLY)
    assert {result.outcome for result in report.results} == {"failed"}
    assert reported in str(report.results[0].message)
    assert time.monotonic() - begin < genai._RUN_TIMEOUT  # no timeout of a run was waited for
