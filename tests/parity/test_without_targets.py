"""An adapter whose config names no targets: all factors are proven, and PEFT reads a copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from loradeploy.export.api import export
from loradeploy.parity.api import parity
from tests.conftest import MakeAdapter
from tests.inputs.edits import edited_json


@pytest.fixture
def without_targets(tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path) -> Path:
    """Factors of modules that PEFT does not choose for a Llama, in a config without targets."""
    place = make_adapter(tiny_llama, target_modules=["k_proj", "down_proj"], out=tmp_path / "a")
    with edited_json(place / "adapter_config.json") as config:
        config["target_modules"] = None
    return place


def test_the_copy_in_the_bundle_has_the_same_effect_in_peft(
    without_targets: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    export(tiny_llama, tmp_path / "bundle", adapters={"a": without_targets})
    report = parity(tmp_path / "bundle", model=tiny_llama, backends=["onnx-side-inputs", "peft"])
    assert report.passed, report.failures
    assert {result.backend for result in report.results} >= {"onnx-side-inputs", "peft"}


def test_peft_is_left_out_for_the_adapter_itself(
    without_targets: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    export(tiny_llama, tmp_path / "bundle", adapters={"a": without_targets}, merge=True)
    report = parity(tmp_path / "bundle", model=tiny_llama, adapters={"a": without_targets})
    assert report.passed, report.failures
    (peft,) = (result for result in report.results if result.backend == "peft")
    assert peft.outcome == "not run"
    assert peft.message == "PEFT adapts other modules: the config of a has no target_modules"
