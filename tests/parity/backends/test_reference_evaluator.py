"""ONNX's reference evaluator as a parity backend, for small graphs of standard operators."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import loradeploy as ld
from loradeploy.parity.backends import evaluator
from tests.conftest import MakeAdapter
from tests.parity.conftest import PROMPTS, Check
from tests.parity.tampering import change_graph, see_the_future_in_chunks

ONLY = {"backends": ["onnx-reference"]}


def test_a_decoder_agrees_with_the_reference_evaluator(
    llama_with_adapter: Path, check: Check
) -> None:
    report = check(llama_with_adapter, **ONLY)
    assert report.passed, report.failures
    assert {result.adapter for result in report.results} == {None, "one"}
    assert all(result.variant is None for result in report.results)


def test_the_adapter_of_a_branch_is_selected(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path, check: Check
) -> None:
    adapter = make_adapter(tiny_llama, seed=1)
    ld.export(tiny_llama, tmp_path / "branches", adapters={"one": adapter}, branches=True)
    report = check(tmp_path / "branches", **ONLY)
    assert report.passed, report.failures


def test_a_classifier_agrees_with_the_reference_evaluator(
    tiny_bert: Path, tiny_bert_bundle: Path
) -> None:
    report = ld.parity(
        tiny_bert_bundle, model=tiny_bert, prompts=PROMPTS, certificate=False, **ONLY
    )
    assert report.passed, report.failures


def test_a_wrong_mask_fails_in_the_reference_evaluator_too(
    llama_bundle: Path, check: Check
) -> None:
    change_graph(llama_bundle, see_the_future_in_chunks)
    failed = {r.phase for r in check(llama_bundle, **ONLY).results if r.outcome == "failed"}
    assert failed == {"chunked prefill"}


def test_a_slow_graph_runs_only_on_request_and_is_not_mentioned_otherwise(
    llama_with_adapter: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "_QUICK", 1)
    assert check(llama_with_adapter, **ONLY, phases=["prefill"]).passed
    silent = check(llama_with_adapter, phases=["decode"])
    assert "onnx-reference" not in {result.backend for result in silent.results}


def test_a_graph_that_is_too_large_is_not_run(
    llama_with_adapter: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "_LARGEST", 1)
    (result,) = check(llama_with_adapter, **ONLY).results
    assert result.outcome == "not run"
    assert "the graph is too large for it (" in str(result.message)


def test_an_operator_outside_the_standard_is_named(llama_bundle: Path, check: Check) -> None:
    def foreign(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == "MatMul")
        node.op_type, node.domain = "FusedMatMul", "com.microsoft"

    change_graph(llama_bundle, foreign)
    (result,) = check(llama_bundle, **ONLY).results
    assert result.outcome == "not run"
    assert "FusedMatMul" in str(result.message)
