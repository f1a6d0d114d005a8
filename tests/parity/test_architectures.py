"""Parity of architectures that differ in features that matter to it, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest

import loradeploy as ld
from tests.conftest import MakeAdapter
from tests.inputs.architectures import ARCHITECTURES, TARGETS, make_model

pytestmark = [pytest.mark.slow, pytest.mark.breadth(5)]

# One per feature that changes a code path of parity; the tests of the export have the others.
CHOSEN: Final = (
    "mistral: a sliding window",
    "gemma2: capped logits, eager attention",
    "phi3: fused projections",
    "opt: positions from the mask",
    "bloom: biased by distance",
    "mixtral: a mixture of experts",
    "roberta: a head of two layers",
    "deberta: layers for tokens and for positions",
)
EMBEDDER: Final = "albert: one layer many times"


@pytest.mark.parametrize(
    ("name", "embeds"),
    [*((name, False) for name in CHOSEN), (EMBEDDER, True)],
    ids=[name.partition(":")[0] for name in (*CHOSEN, EMBEDDER)],
)
def test_every_architecture_passes_with_an_effect(
    name: str, embeds: bool, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    task, config_class, values = ARCHITECTURES[name]
    task = "feature-extraction" if embeds else task
    model = make_model(tmp_path / "model", task, config_class, values)
    (architecture,) = json.loads((model / "config.json").read_text())["architectures"]
    targets = TARGETS.get(architecture, "all-linear")
    adapter = make_adapter(model, out=tmp_path / "a", task=task, scale=0.1, target_modules=targets)
    ld.export(model, tmp_path / "bundle", adapters={"a": adapter}, task=task)
    report = ld.parity(
        tmp_path / "bundle",
        model=model,
        tokens=4 if task == "causal-lm" else None,
        backends=["onnx-side-inputs", "onnx-merged"],
        certificate=False,
    )
    assert report.passed, report.failures
    assert {(r.backend, r.adapter) for r in report.results} == {
        ("onnx-side-inputs", None), ("onnx-side-inputs", "a"), ("onnx-merged", "a"),
    }  # fmt: skip
    assert report.adapters[0].effect > 0.1, "the adapter did nothing"
