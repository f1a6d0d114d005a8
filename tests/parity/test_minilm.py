"""Parity of the real MiniLM, as a sentence encoder and as a classifier with its own head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loradeploy.export.api import export
from loradeploy.parity.api import parity
from loradeploy.parity.inputs.prompts import PROMPTS
from tests.conftest import MakeAdapter

CLASSIFIER = {
    "task": "sequence-classification",
    "num_labels": 5,
    "modules_to_save": ["classifier"],
}


@pytest.mark.slow
@pytest.mark.breadth(2)
@pytest.mark.parametrize(
    "options", [{"task": "feature-extraction"}, CLASSIFIER], ids=["embedder", "classifier"]
)
def test_minilm_agrees_with_pytorch(
    options: dict[str, Any], minilm: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapters = {
        name: make_adapter(
            minilm, r=rank, seed=rank, target_modules=["query", "value", "dense"], **options
        )
        for name, rank in (("small", 4), ("large", 16))
    }
    export(minilm, tmp_path / "bundle", adapters=adapters, task=options["task"])
    prompts = [*sorted(PROMPTS, key=len)[::4], PROMPTS[12]]  # of all lengths, of two scripts
    report = parity(tmp_path / "bundle", model=minilm, prompts=prompts)
    assert report.passed, report.failures
    assert {facts.name for facts in report.adapters} == set(adapters)
    assert all(facts.effect > 0.1 for facts in report.adapters), "an adapter did nothing"
