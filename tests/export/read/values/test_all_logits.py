"""Graphs with an input for the number of logits, which an export replaces by all positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.errors import ExportError
from loradeploy.export.api import export
from loradeploy.export.read.values.all_logits import keep_all_logits
from loradeploy.runtime.session import AdapterSession
from tests.export.graphs import IN, Builder, run
from tests.tolerances import tolerance

WORDS = 50
IDS = np.array([[5, 6, 7], [8, 9, 4]])


def _decoder(name: str, shape: list[int | str], kind: ir.DataType) -> ir.Model:
    """Return a decoder without a cache; its input `name` is the number of tokens with logits."""
    b = Builder()
    ids = b.input("input_ids", ["batch", "sequence"], ir.DataType.INT64)
    kept = b.input(name, shape, kind)
    x = b.node("Gather", [b.weight("words", WORDS, IN), ids], ["batch", "sequence", IN])
    start = b.node("Cast", [kept], shape, name="kept", to=int(ir.DataType.INT64))
    start = b.node("Neg", [start], shape)
    start = b.node("Reshape", [start, b.constant("one", np.array([1]))], [1])
    for node in b.nodes[1:]:
        node.outputs[0].dtype = ir.DataType.INT64
    x = b.node("MatMul", [x, b.weight("w", IN, IN)], ["batch", "sequence", IN], module="proj")
    ends = [b.constant("end", np.array([2**62])), b.constant("axis", np.array([1]))]
    x = b.node("Slice", [x, start, *ends], ["batch", "kept", IN])
    head = b.weight("head", IN, WORDS)
    size = ["batch", "kept", WORDS]
    return b.model(b.node("MatMul", [x, head], size, name="logits", module="lm_head"))


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("num_logits_to_keep", [], ir.DataType.INT64),
        ("logits_to_keep", [1], ir.DataType.INT32),
    ],
    ids=["a number", "an axis"],
)
def test_the_input_is_removed_and_all_tokens_have_logits(
    name: str, shape: list[int | str], kind: ir.DataType, tmp_path: Path
) -> None:
    model = _decoder(name, shape, kind)
    all_of_them = run(model, {"input_ids": IDS, name: np.zeros(shape, kind.numpy())})
    assert all_of_them.shape == (2, 3, WORDS)
    ir.save(model, tmp_path / "model.onnx")
    export(tmp_path / "model.onnx", tmp_path / "b", task="causal-lm")
    session = AdapterSession(tmp_path / "b")
    assert [spec.name for spec in session.manifest.inputs] == ["input_ids"]
    (logits,) = session.run(["logits"], {"input_ids": IDS})
    assert np.abs(logits - all_of_them).max() <= tolerance("torch-onnx-tiny")


def test_position_ids_are_not_taken_for_the_input() -> None:
    model = _decoder("logits_to_keep", ["batch", "kept"], ir.DataType.INT64)
    keep_all_logits(model.graph)
    assert [value.name for value in model.graph.inputs] == ["input_ids", "logits_to_keep"]


def _picking(*positions: int) -> ir.Model:
    """Return a decoder with logits at the positions of an input, or at constant `positions`."""
    b = Builder()
    ids = b.input("input_ids", ["batch", "sequence"], ir.DataType.INT64)
    x = b.node("Gather", [b.weight("words", WORDS, IN), ids], ["batch", "sequence", IN])
    x = b.node("MatMul", [x, b.weight("w", IN, IN)], ["batch", "sequence", IN], module="proj")
    kept = (
        b.constant("kept", np.array(positions))
        if positions
        else b.input("logits_to_keep", ["kept"], ir.DataType.INT64)
    )
    x = b.node("Gather", [x, kept], ["batch", "kept", IN], axis=1)
    size = ["batch", "kept", WORDS]
    head = b.weight("head", IN, WORDS)
    return b.model(b.node("MatMul", [x, head], size, name="logits", module="lm_head"))


@pytest.mark.parametrize("cast", [False, True], ids=["as it is", "by a cast"])
def test_a_list_of_positions_is_refused_by_name(cast: bool, tmp_path: Path) -> None:
    """A 0 in it would select the logits of the first token, for every prompt."""
    model = _picking()
    if cast:
        gather = next(n for n in model.graph if n.attributes.get("axis") is not None)
        to_int32 = ir.node("Cast", [gather.inputs[1]], attributes={"to": int(ir.DataType.INT32)})
        model.graph.insert_before(gather, to_int32)
        gather.replace_input_with(1, to_int32.outputs[0])
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="input logits_to_keep is not how many last tokens"):
        export(tmp_path / "model.onnx", tmp_path / "b", task="causal-lm")


@pytest.mark.parametrize(
    ("positions", "why"),
    [((0,), "do not depend on the last token"), ((0, 1), r"of 2 of \d+ tokens")],
    ids=["the first", "some"],
)
def test_logits_of_other_tokens_than_the_last_are_refused(
    positions: tuple[int, ...], why: str, tmp_path: Path
) -> None:
    ir.save(_picking(*positions), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=why):
        export(tmp_path / "model.onnx", tmp_path / "b", task="causal-lm")


def test_logits_of_only_the_last_token_are_accepted(tmp_path: Path) -> None:
    ir.save(_picking(-1), tmp_path / "model.onnx")
    assert export(tmp_path / "model.onnx", tmp_path / "b", task="causal-lm").task == "causal-lm"
