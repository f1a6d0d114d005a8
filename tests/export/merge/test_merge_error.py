"""The merge error: how much of an update survives rounding; merging into packed weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import ExportError, UsageError
from loradeploy.export.api import export
from loradeploy.export.merge_error import Tally
from loradeploy.parity.api import parity
from tests.cli.calling import call
from tests.conftest import MakeAdapter
from tests.export.reference import apart, onnx_output, torch_output

IDS = np.random.default_rng(3).integers(3, 512, (3, 11))


def test_an_update_that_is_stored_exactly_has_no_error() -> None:
    generator = np.random.default_rng(0)
    before, delta = generator.standard_normal((2, 30, 20)).astype(np.float32)
    tally = Tally()
    tally.add(before, before + delta, lambda W: W)
    error = tally.error()
    assert error is not None
    assert (error.kept, error.noise) == (1.0, pytest.approx(0, abs=1e-3))


def test_half_of_an_update_is_kept_as_one_half_and_other_changes_are_noise() -> None:
    before = np.zeros((2, 4), np.float32)
    after = np.array([[2, 0, 0, 0]] * 2, np.float32)
    tally = Tally()
    tally.add(before, after, lambda W: W / 2 + np.float32([0, 3, 0, 0]) * (W.any()))
    error = tally.error()
    assert error is not None
    assert (error.kept, error.noise) == (0.5, 1.5)
    assert Tally().error() is None


@pytest.mark.parametrize(
    ("precision", "most_noise"),
    [("fp32", 1e-4), ("fp16", 0.02), ("bf16", 0.2), ("int8", 1.0), ("int4", 10.0)],
)
def test_every_precision_reports_its_merge_error(
    precision: str, most_noise: float, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, r=4, seed=1, scale=0.1)
    place = tmp_path / "merged"
    export(tiny_llama, place, adapters={"a": adapter}, merge=True, precision=precision)
    error = read_manifest(place).merge_error
    assert error is not None
    assert error.kept == pytest.approx(1, abs=0.02)
    assert most_noise / 100 < error.noise < most_noise or precision == "fp32"


def test_a_large_merge_error_is_a_warning(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strong = make_adapter(tiny_llama, r=4, seed=1, scale=0.1)
    export(tiny_llama, tmp_path / "a", adapters={"a": strong}, merge=True, precision="fp16")
    assert "rounding noise" not in caplog.text
    faint = make_adapter(tiny_llama, r=4, seed=1, scale=0.001)
    export(tiny_llama, tmp_path / "b", adapters={"b": faint}, merge=True, precision="fp16")
    assert "fp16 keeps" in caplog.text
    assert "use side inputs, which are not rounded" in caplog.text


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_packed_weights_are_merged_with_requantize(
    precision: str, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, r=4, seed=1, scale=0.2)
    base, merged = tmp_path / "base", tmp_path / "merged"
    export(tiny_llama, base, precision=precision)
    with pytest.raises(ExportError, match="already quantized.*`requantize`"):
        export(base, merged, adapters={"a": adapter}, merge=True)
    manifest = export(base, merged, adapters={"a": adapter}, merge=True, requantize=True)
    assert manifest.precision == precision
    assert manifest.merge_error is not None
    assert manifest.merge_error.kept == pytest.approx(1, abs=0.05)
    expected = torch_output(tiny_llama, IDS, adapter=adapter)
    got = apart(onnx_output(merged, IDS), expected)
    assert got < apart(onnx_output(base, IDS), expected) / 3, "the adapter is not in it"


def test_export_inspect_and_parity_show_the_merge_error(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter, place = make_adapter(tiny_llama, r=4, seed=1, scale=0.1), tmp_path / "merged"
    given = ("--model", tiny_llama, "--output", place, "--adapter", adapter, "--merge")
    message = call("export", *given, "--precision", "fp16")
    error = read_manifest(place).merge_error
    assert error is not None
    line = f"kept {error.kept:g}, noise {error.noise:g}"
    assert re.search(rf"merge error +{line}\n", message)
    assert re.search(rf"merge error +{line}\n", call("inspect", place))
    result = json.loads(call("inspect", place, "--json"))["merge_error"]
    assert result == {"kept": error.kept, "noise": error.noise}
    report = parity(place, model=tiny_llama, adapters=[adapter], prompts=["Hi"], tokens=2)
    assert any(f"fp16 kept {error.kept:.1%} of the merged update" in note for note in report.notes)


def test_requantize_is_only_for_merging(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`requantize` is for `merge`"):
        export(tiny_llama, tmp_path / "out", requantize=True)
