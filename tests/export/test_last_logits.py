"""Decoders that output only the logits of the last position, as some exporters write them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.errors import UsageError
from loradeploy.export.api import export
from loradeploy.parity.api import parity
from loradeploy.parity.phases.outputs import check_positions
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.conftest import once
from tests.export import others
from tests.export.graphs import IN, Builder
from tests.export.reference import torch_output


@pytest.fixture(scope="module")
def decoder(shared: Path, tiny_llama: Path) -> Path:
    """A decoder with logits [batch, vocabulary] instead of [batch, sequence, vocabulary]."""

    def make(out: Path) -> None:
        others.export_decoder(tiny_llama, out, cache=False)
        model = ir.load(out / "model.onnx")
        (every,) = model.graph.outputs
        assert every.shape is not None
        index = ir.tensor(np.array(-1, np.int64), name="last")
        last = ir.Value(name="last", type=ir.TensorType(index.dtype), const_value=index)
        model.graph.register_initializer(last)
        gather = ir.node("Gather", [every, last], attributes={"axis": 1}, name="take_last")
        every.name, (only,) = "all_logits", gather.outputs
        only.name, only.type = "logits", every.type
        only.shape = ir.Shape(["batch", every.shape[-1]])
        model.graph.append(gather)
        model.graph.outputs[0] = only
        ir.save(model, out / "model.onnx")

    return once(shared / "decoder-of-last-logits", make)


def test_the_decoder_is_not_taken_for_a_classifier_with_one_label_per_token(
    decoder: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    manifest = export(decoder, tmp_path / "bundle")
    assert manifest.task == "causal-lm"
    prompts = [[5, 17, 42, 99], [9, 8]]
    rows = TextGenerator(AdapterSession(tmp_path / "bundle")).generate(prompts, max_new_tokens=1)
    for prompt, row in zip(prompts, rows, strict=True):
        expected = torch_output(tiny_llama, np.array([prompt]))[0, -1].argmax()
        assert row.token_ids == (expected,)


def test_without_a_config_the_task_follows_from_the_shape(decoder: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(decoder, tmp_path / "alone"))
    (alone / "config.json").unlink()
    assert export(alone, tmp_path / "bundle").task == "sequence-classification"


def test_parity_refuses_logits_of_only_the_last_position(
    decoder: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    export(decoder, tmp_path / "bundle")
    with pytest.raises(UsageError, match=r"gives logits \[batch, \d+\], not those of every token"):
        parity(tmp_path / "bundle", model=tiny_llama)


@pytest.mark.parametrize("shape", [(2, 1, 7), (2, 7)])
def test_parity_refuses_such_logits_where_only_a_run_shows_the_shape(
    shape: tuple[int, ...],
) -> None:
    check_positions(np.zeros((2, 3, 7)), 3)
    with pytest.raises(UsageError, match="not those of every token"):
        check_positions(np.zeros(shape), 3)


def test_a_wrong_declared_length_of_the_logits_is_detected(
    tmp_path: Path,
) -> None:
    """The bundle gets no input that selects positions, which needs logits of the whole row."""
    b, sizes = Builder(), ["batch", "sequence", IN]
    ids = b.input("input_ids", ["batch", "sequence"], ir.DataType.INT64)
    x = b.node("Gather", [b.weight("words", 50, IN), ids], sizes)
    x = b.node("MatMul", [x, b.weight("w", IN, IN)], sizes, module="proj")
    span = [b.constant(n, np.array([at])) for n, at in (("from", -1), ("to", 2**62), ("axis", 1))]
    x = b.node("Slice", [x, *span], sizes)
    y = b.node("MatMul", [x, b.weight("head", IN, 50)], ["batch", "sequence", 50], name="logits")
    ir.save(b.model(y), tmp_path / "model.onnx")
    manifest = export(tmp_path / "model.onnx", tmp_path / "b", task="causal-lm")
    assert not manifest.logits_to_keep
    (logits,) = AdapterSession(tmp_path / "b").run(["logits"], {"input_ids": np.ones((2, 3), int)})
    assert logits.shape == (2, 1, 50)
