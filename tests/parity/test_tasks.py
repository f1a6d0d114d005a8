"""Parity of bundles with other inputs or outputs than text: images, audio, target sequences."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.adapter.files.peft import load_adapter, save_adapter
from loradeploy.bundle.manifest import BaseIdentity, Manifest, TensorSpec
from loradeploy.errors import UsageError
from loradeploy.parity.checks.mistakes import wrong_adapter
from loradeploy.parity.inputs.row_feeds import TARGET, check_inputs, plain_feeds
from loradeploy.parity.phases.choice import phases_of
from tests.export.tasks.test_tasks import KINDS, prepared


@pytest.mark.breadth(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_task_passes_and_another_adapter_fails(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    model, adapters, _ = prepared(kind, tmp_path)
    ld.export(model, tmp_path / "side", adapters=adapters)
    report = ld.parity(tmp_path / "side", model=model, certificate=False)
    assert report.passed, report.failures
    assert report.task == kind.task
    assert {result.phase for result in report.results} == set(phases_of(kind.task))
    assert {result.outcome for result in report.results} == {"passed"}
    assert all(facts.effect > 0.1 for facts in report.adapters)

    wrong = wrong_adapter(load_adapter(adapters["first"]))
    assert wrong is not None
    save_adapter(wrong, tmp_path / "wrong")
    ld.export(tmp_path / "side", tmp_path / "merged", adapters=[tmp_path / "wrong"], merge=True)
    failed = ld.parity(
        tmp_path / "merged",
        model=model,
        adapters={"first": adapters["first"]},
        backends=["onnx-merged"],
        phases=[phases_of(kind.task)[0], "padded batch"],
        certificate=False,
    )
    assert {result.outcome for result in failed.results} == {"failed"}


def changed(adapter: Path, place: Path, part: str) -> Path:
    """Copy the adapter with doubled factors of all modules that have `part` in their names."""
    right = load_adapter(adapter)
    factors = {
        module: dataclasses.replace(pair, B=pair.B * (2 if part in module else 1))
        for module, pair in right.factors.items()
    }
    save_adapter(dataclasses.replace(right, factors=factors), place)
    return place


@pytest.mark.parametrize(
    ("part", "fails"), [("encoder.", True), ("EncDecAttention.k", True), ("SelfAttention.q", False)]
)
def test_the_encoder_of_an_encoder_decoder_is_compared_separately(
    part: str, fails: bool, tmp_path: Path
) -> None:
    model, adapters, _ = prepared(KINDS["t5"], tmp_path)
    named = part if fails else f"decoder.block.0.layer.0.{part}"
    wrong = changed(adapters["first"], tmp_path / "wrong", named)
    ld.export(model, tmp_path / "merged", adapters={"first": wrong}, merge=True)
    report = ld.parity(
        tmp_path / "merged",
        model=model,
        adapters={"first": adapters["first"]},
        phases=["encoder", "prefill"],
        certificate=False,
    )
    found = {(result.backend, result.phase): result for result in report.results}
    in_graph = found["onnx-merged", "encoder"]
    assert (in_graph.outcome == "failed") == fails, in_graph.message
    assert in_graph.effect is not None and in_graph.effect > 0.1
    assert found["onnx-merged", "prefill"].outcome == "failed"
    for backend in ("torch-merged", "peft"):
        assert found[backend, "encoder"].outcome == "passed"
        figures = found[backend, "encoder"].figures
        assert figures is not None and figures.top1 is None, "keys and values are no logits"


def test_an_encoder_without_the_adapter_fails(tmp_path: Path) -> None:
    model, adapters, _ = prepared(KINDS["whisper"], tmp_path)
    ld.export(model, tmp_path / "side", adapters=adapters)
    report = ld.parity(
        tmp_path / "side", model=model, controls=True, phases=["encoder"], certificate=False
    )
    assert report.passed, report.failures
    own = [c for c in report.controls if c.name == "encoder without adapter"]
    assert [(control.adapter, control.caught) for control in own] == [
        ("first", True),
        ("second", True),
    ]
    mixed = [result for result in report.results if result.backend == "onnx-mixed"]
    assert {result.adapter for result in mixed} == {None, "first", "second"}


@pytest.mark.breadth(2)
@pytest.mark.parametrize(("name", "precision"), [("bart", "int8"), ("bart", "int4")])
def test_the_limits_of_the_encoder_are_those_of_the_precision(
    name: str, precision: str, tmp_path: Path
) -> None:
    model, adapters, _ = prepared(KINDS[name], tmp_path)
    ld.export(model, tmp_path / "side", adapters=adapters, precision=precision)
    report = ld.parity(
        tmp_path / "side", model=model, controls=True, phases=["encoder"], certificate=False
    )
    assert report.passed, report.failures
    assert all(control.caught for control in report.controls)


def manifest(*inputs: TensorSpec) -> Manifest:
    base = BaseIdentity("base", None, "checkpoint")
    return Manifest("image-classification", "side-inputs", base, "fp32", 23, inputs, ())


IMAGE = TensorSpec("pixel_values", "float32", ("batch", 3, 4, 4))


def test_a_row_has_the_same_random_image_alone_and_in_a_padded_batch() -> None:
    ids = np.array([[5, 6, 7], [8, 0, 0]])
    mask = np.array([[1, 1, 1], [1, 0, 0]])
    both = plain_feeds(manifest(IMAGE), ids, mask)["pixel_values"]
    alone = plain_feeds(manifest(IMAGE), ids[1:, :1], mask[1:, :1])["pixel_values"]
    assert both.shape == (2, 3, 4, 4)
    assert np.array_equal(both[1:], alone)
    assert not np.array_equal(both[0], both[1])
    assert np.array_equal(both, both.astype(np.float16)), "float16 rounds it"


def test_a_target_sequence_does_not_depend_on_the_padding() -> None:
    spec = TensorSpec("decoder_input_ids", "int64", ("batch", "target"))
    ids, mask = np.array([[5, 6, 0], [7, 8, 9]]), np.array([[1, 1, 0], [1, 1, 1]])
    target = plain_feeds(manifest(spec), ids, mask)["decoder_input_ids"]
    assert target.tolist() == [[5, 6] * (TARGET // 2), [7, 8, 9, 7, 8, 9, 7, 8]]


@pytest.mark.parametrize(
    "spec",
    [
        dataclasses.replace(IMAGE, shape=("batch", 3, "height", "width")),
        TensorSpec("bbox", "int64", ("batch", "sequence", 4)),
    ],
    ids=["an image of any size", "an unknown input"],
)
def test_an_unsupported_input_is_refused_by_name(spec: TensorSpec) -> None:
    with pytest.raises(UsageError, match=rf"cannot feed .* {spec.name} \[batch"):
        check_inputs(manifest(spec))


@pytest.mark.parametrize("shape", [(1, "sequence"), ("batch", 8)], ids=str)
def test_parity_needs_dynamic_batch_and_sequence_sizes(shape: tuple[int | str, ...]) -> None:
    free = TensorSpec("input_ids", "int64", ("batch", "sequence"))
    check_inputs(manifest(free))
    with pytest.raises(UsageError, match=r"takes input_ids \[.*\], and parity feeds rows of many"):
        check_inputs(manifest(dataclasses.replace(free, shape=shape)))
