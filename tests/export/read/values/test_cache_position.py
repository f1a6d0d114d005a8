"""The input cache_position, which the other inputs determine, is computed in the bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import loradeploy as ld
from loradeploy.errors import ExportError
from loradeploy.export.read.values.cache_position import compute_cache_position
from tests.conftest import MakeAdapter
from tests.export.graphs import Builder, run
from tests.export.others import export_decoder
from tests.export.reference import difference, torch_output
from tests.tolerances import tolerance

IDS = np.random.default_rng(2).integers(3, 512, (2, 7))
BEFORE = 4  # tokens of the first step
INT64, INT32 = ir.DataType.INT64, ir.DataType.INT32


def _reader(
    past: list[int | str] | None, dtype: ir.DataType, position: list[int | str] | None = None
) -> ir.Model:
    """A graph that gives its cache_position."""
    b = Builder()
    b.input("input_ids", ["batch", "sequence"], INT64)
    if past is not None:
        b.input("past_key_values.0.key", past)
        b.input("past_key_values.0.encoder.key", ["batch", 2, "source", 4])
    given = b.input("cache_position", position or ["sequence"], dtype)
    same = b.node("Identity", [given], ["sequence"])
    same.type = ir.TensorType(dtype)
    return b.model(same)


@pytest.mark.parametrize("dtype", [INT64, INT32])
@pytest.mark.parametrize(
    ("layout", "axis"), [(["batch", 2, "past", 4], 2), (["batch", "past", 2, 4], 1), (None, None)]
)
def test_positions_start_behind_the_cache(
    layout: list[int | str] | None, axis: int | None, dtype: ir.DataType
) -> None:
    model = _reader(layout, dtype)
    compute_cache_position(model.graph)
    feeds = {"input_ids": IDS[:, :3]}
    past = 0
    if axis is not None and layout is not None:
        past, shape = 5, [2 if isinstance(size, str) else size for size in layout]
        shape[axis] = past
        feeds["past_key_values.0.key"] = np.zeros(shape, np.float32)
        feeds["past_key_values.0.encoder.key"] = np.zeros((2, 2, 9, 4), np.float32)
    found = run(model, feeds)
    assert found.tolist() == [past, past + 1, past + 2]
    assert found.dtype == dtype.numpy()


@pytest.mark.parametrize(
    ("past", "position", "why"),
    [
        (["batch", 2, 16, 4], None, "in a cache of a fixed size"),
        (["batch", 2, "past", 4], ["batch", "sequence"], "not one position for each of the tokens"),
    ],
)
def test_positions_that_the_inputs_do_not_determine_are_refused(
    past: list[int | str], position: list[int | str] | None, why: str
) -> None:
    with pytest.raises(ExportError, match=f"input cache_position .*{why}"):
        compute_cache_position(_reader(past, INT64, position).graph)


def _with_cache_position(file: Path) -> None:
    """Give a decoder cache_position [sequence] in place of position_ids [batch, sequence]."""
    model = ir.load(file)
    (ids,) = (v for v in model.graph.inputs if v.name == "position_ids")
    given = ir.Value(name="cache_position", type=ir.TensorType(INT64), shape=ir.Shape(["sequence"]))
    zero = ir.tensor(np.zeros(1, np.int64), name="axis_of_rows")
    axis = ir.Value(name="axis_of_rows", const_value=zero)
    model.graph.register_initializer(axis)
    row = ir.node("Unsqueeze", [given, axis], name="row_of_positions")
    row.outputs[0].name = "row_of_positions"
    ids.replace_all_uses_with(row.outputs[0])
    model.graph.inputs.remove(ids)
    model.graph.inputs.append(given)
    model.graph.insert_before(model.graph[0], row)
    ir.save(model, file)


def test_a_decoder_with_it_takes_the_steps_of_peft(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    export_decoder(tiny_llama, tmp_path / "graph", cache=True, positions=True)
    _with_cache_position(tmp_path / "graph" / "model.onnx")
    adapter = make_adapter(tiny_llama, r=4, alpha=8, seed=4, target_modules="all-linear")
    given = {"adapters": {"small": adapter}, "checkpoint": tiny_llama}
    manifest = ld.export(tmp_path / "graph", tmp_path / "b", **given)
    assert "cache_position" not in [spec.name for spec in manifest.inputs]
    expected, base = torch_output(tiny_llama, IDS, adapter=adapter), torch_output(tiny_llama, IDS)
    assert difference(expected, base) > 0.1, "the adapter does nothing"
    ld.export(tmp_path / "graph", tmp_path / "merged", merge=True, **given)
    for place, rows in (("b", (expected[0], base[1])), ("merged", expected)):
        session = ld.AdapterSession(tmp_path / place)
        caches = [spec for spec in session.manifest.inputs if spec.name.startswith("past")]
        past = {s.name: np.zeros((len(IDS), s.shape[1], 0, s.shape[3]), np.float32) for s in caches}
        presents = [name.replace("past_key_values", "present") for name in past]
        for step in (slice(0, BEFORE), slice(BEFORE, None)):
            mask = np.ones_like(IDS[:, : step.stop])
            feeds = {"input_ids": IDS[:, step], "attention_mask": mask, **past}
            chosen = ["small", None] if place == "b" else None
            logits, *made = session.run(["logits", *presents], feeds, adapters=chosen)
            past = dict(zip(past, made, strict=True))
            for row in range(len(IDS)):
                assert difference(logits[row], rows[row][step]) <= tolerance("torch-onnx-tiny")
