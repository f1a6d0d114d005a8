"""The layout "rows" instead of "slots", on minimal graphs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.errors import ExportError
from loradeploy.export.match.linears import find_linears
from loradeploy.export.match.whole.parts import find_parts
from loradeploy.export.passes.forms.layout import supports_rows, use_row_layout
from loradeploy.export.passes.side_inputs.inject import (
    SideInputs,
    inject_side_inputs,
    remove_side_inputs,
)
from tests.export.graphs import IN, OUT, Builder, linear, manifest_of, numbers, ops, run

FACTORS = {
    "block.proj.lora_A": numbers(2, IN, 2, seed=1),
    "block.proj.lora_B": numbers(2, 2, OUT, seed=2),
}


def in_rows() -> tuple[ir.Model, SideInputs]:
    """One linear layer with side inputs in the rows layout."""
    model = linear()
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    use_row_layout(model.graph)
    return model, added


def test_there_is_no_gather_and_no_adapter_ids() -> None:
    model, _ = in_rows()
    assert ops(model) == ["MatMul", "MatMul", "MatMul", "Add"]
    assert [value.name for value in model.graph.inputs] == ["x", *FACTORS]


def test_slot_i_belongs_to_row_i() -> None:
    model, _ = in_rows()
    x = numbers(2, 3, IN)
    A, B = FACTORS.values()
    base = run(linear(), {"x": x})
    expected = base + np.stack([x[row] @ A[row] @ B[row] for row in range(2)])
    assert np.abs(expected - base).max() > 1
    np.testing.assert_allclose(run(model, {"x": x, **FACTORS}), expected, atol=1e-5)


def test_one_slot_belongs_to_all_rows() -> None:
    model, _ = in_rows()
    x = numbers(2, 3, IN)
    A, B = (factor[:1] for factor in FACTORS.values())
    feeds = {"x": x, "block.proj.lora_A": A, "block.proj.lora_B": B}
    expected = run(linear(), {"x": x}) + x @ A[0] @ B[0]
    np.testing.assert_allclose(run(model, feeds), expected, atol=1e-5)


def test_without_side_inputs_the_result_is_the_base_bit_for_bit() -> None:
    model, _ = in_rows()
    x = numbers(2, 3, IN)
    np.testing.assert_array_equal(run(model, {"x": x}), run(linear(), {"x": x}))


def test_removing_side_inputs_of_the_rows_layout_restores_the_graph() -> None:
    model, added = in_rows()
    remove_side_inputs(model, manifest_of(added))
    x = numbers(2, 3, IN)
    assert ops(model) == ops(linear())
    assert [value.name for value in model.graph.inputs] == ["x"]
    np.testing.assert_array_equal(run(model, {"x": x}), run(linear(), {"x": x}))


def test_factors_of_an_embedding_keep_their_slots() -> None:
    b = Builder()
    ids = b.input("ids", ["batch", "sequence"], ir.DataType.INT64)
    y = b.node("Gather", [b.weight("t", 9, IN), ids], ["batch", "sequence", IN], module="embed")
    model = b.model(y)
    inject_side_inputs(model, [], embeddings=[find_parts(model)["embed"]])
    before = ops(model)
    assert not supports_rows(model.graph)
    with pytest.raises(ExportError, match="embeddings need slot numbers"):
        use_row_layout(model.graph)
    assert ops(model) == before
