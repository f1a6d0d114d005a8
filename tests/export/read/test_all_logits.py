"""A graph that asks of how many tokens it is to give logits gives those of all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.export.api import export
from loradeploy.export.read.all_logits import keep_all_logits
from loradeploy.runtime.session import AdapterSession
from tests.export.graphs import IN, Builder, run
from tests.tolerances import tolerance

WORDS = 50
IDS = np.array([[5, 6, 7], [8, 9, 4]])


def _decoder(name: str, shape: list[int | str], kind: ir.DataType) -> ir.Model:
    """Logits of the last `name` tokens, without a cache."""
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
def test_the_input_is_gone_and_all_tokens_have_logits(
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


def test_positions_are_another_input() -> None:
    model = _decoder("logits_to_keep", ["batch", "kept"], ir.DataType.INT64)
    keep_all_logits(model.graph)
    assert [value.name for value in model.graph.inputs] == ["input_ids", "logits_to_keep"]
