"""Parity on a real model: every path has PEFT's logits and the same greedy tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

import loradeploy as ld
from loradeploy.parity.inputs.prompts import PROMPTS
from loradeploy.parity.report.results import ParityReport
from tests.tolerances import tolerance

ONNX_PATHS = {"onnx-merged", "onnx-side-inputs", "onnx-native", "onnx-mixed"}


@pytest.fixture(scope="module")
def width(request: pytest.FixtureRequest) -> tuple[int, int]:
    """The number of prompts and of generated tokens: more with --all."""
    return (len(PROMPTS), 32) if request.config.getoption("--all") else (4, 4)


@pytest.fixture(scope="module")
def report(
    smollm2: Path,
    smollm2_bundle: Path,
    smollm2_adapters: dict[str, Path],
    width: tuple[int, int],
) -> ParityReport:
    prompts, tokens = width
    return ld.parity(
        smollm2_bundle,
        model=smollm2,
        adapters=smollm2_adapters,
        prompts=PROMPTS[:prompts],
        tokens=tokens,
        phases=["prefill", "padded batch", "decode"],
        certificate=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_path_agrees(report: ParityReport) -> None:
    assert report.passed, report.failures
    assert {result.backend for result in report.results} >= {*ONNX_PATHS, "peft", "torch-merged"}
    assert all(facts.effect > 1.0 for facts in report.adapters), "the adapters change too little"


@pytest.mark.slow
def test_every_onnx_path_is_close_to_peft(report: ParityReport) -> None:
    # Both were compared with loradeploy's LoRA: their difference is at most the sum of the errors.
    errors = {
        (result.backend, result.adapter_label, result.phase): result.figures.max_abs
        for result in report.results
        if result.figures is not None
    }
    peft = max(error for (backend, *_), error in errors.items() if backend == "peft")
    assert peft <= tolerance("same-torch")
    for path, error in errors.items():
        if path[0] in ONNX_PATHS:
            assert error + peft <= tolerance("torch-onnx-smollm2"), path


@pytest.mark.slow
def test_every_greedy_token_is_the_same(report: ParityReport, width: tuple[int, int]) -> None:
    assert (report.inputs.prompts, report.inputs.generated) == width
    decoded = [result for result in report.results if result.phase == "decode"]
    assert {result.backend for result in decoded} == ONNX_PATHS
    for result in decoded:
        assert result.figures is not None
        assert result.figures.greedy == 1.0, (result.backend, result.adapter_label)
