"""The choice of the bundle outputs that are compared with PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir
import pytest

import loradeploy as ld
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import BundleError
from loradeploy.parity.names import REPEAT
from loradeploy.parity.phases.outputs import output_names
from tests.conftest import MakeAdapter, once
from tests.export import others
from tests.parity.conftest import Check


@pytest.fixture(scope="module")
def probable(shared: Path, tiny_llama: Path) -> Path:
    """A decoder from another exporter whose only output is the softmax of its logits."""

    def make(out: Path) -> None:
        others.export_decoder(tiny_llama, out, cache=False)
        model = ir.load(out / "model.onnx")
        (logits,) = model.graph.outputs
        softmax = ir.node("Softmax", [logits], attributes={"axis": -1}, name="softmax")
        logits.name, (given,) = "scores", softmax.outputs
        given.name, given.type, given.shape = "logits", logits.type, logits.shape
        model.graph.append(softmax)
        model.graph.outputs[0] = given
        ir.save(model, out / "model.onnx")

    return once(shared / "decoder-of-probabilities", make)


def test_parity_compares_the_logits_where_probabilities_are_an_output_too(
    probable: Path, tiny_llama: Path, make_adapter: MakeAdapter, check: Check, tmp_path: Path
) -> None:
    right, wrong = (make_adapter(tiny_llama, seed=seed) for seed in (1, 2))
    ld.export(probable, tmp_path / "b", adapters={"one": right}, checkpoint=tiny_llama)
    manifest = read_manifest(tmp_path / "b")
    assert [spec.name for spec in manifest.outputs] == ["probabilities", "logits"]
    assert output_names(manifest) == ("logits",)
    report = check(tmp_path / "b")
    assert report.passed, report.failures
    assert all(facts.effect > 0.1 for facts in report.adapters), "the adapter did nothing"

    ld.export(tmp_path / "b", tmp_path / "merged", adapters={"one": wrong}, merge=True)
    assert read_manifest(tmp_path / "merged").probabilities == "probabilities"
    failed = check(tmp_path / "merged", adapters={"one": right}, backends=["onnx-merged"])
    found = {r.phase: r.outcome for r in failed.results if r.adapter == "one"}
    assert found.pop(REPEAT) == "passed", "the wrong adapter's answers are the same each time"
    assert len(found) > 1
    assert set(found.values()) == {"failed"}


def test_probabilities_have_to_be_an_output(tiny_llama_bundle: Path) -> None:
    manifest = dataclasses.replace(read_manifest(tiny_llama_bundle), probabilities="others")
    with pytest.raises(BundleError, match="probabilities is 'others', not an output"):
        type(manifest).from_json(manifest.to_json())
