"""Scales, offsets and embedding factors as side inputs, on minimal graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.errors import ExportError
from loradeploy.export.match.linears import Linear, find_linears
from loradeploy.export.match.whole.parts import find_parts
from loradeploy.export.passes.side_inputs.inject import (
    SideInputs,
    inject_side_inputs,
    remove_side_inputs,
)
from loradeploy.export.passes.side_inputs.output_scale import Change
from tests.export.graphs import IN, OUT, Builder, linear, manifest_of, numbers, ops, run

VOCABULARY = 9
SLOTS = np.array([1, 0, 1])


def _inject(model: ir.Model, *, scale: bool = True, offset: bool = True) -> SideInputs:
    linears: list[Linear] = list(find_linears(model).linears.values())
    changes = [Change(layer, scale=scale, offset=offset) for layer in linears]
    return inject_side_inputs(model, linears, changes=changes)


def _product(how: str) -> ir.Model:
    """x W + b of module m, with x [batch, sequence, in], [batch, in], or flattened in between."""
    b = Builder()
    w = b.weight("w", IN, OUT)
    if how == "separate bias":
        x = b.input("x", ["batch", "sequence", IN])
        product = b.node("MatMul", [x, w], ["batch", "sequence", OUT], module="m")
        y = b.node("Add", [product, b.weight("b", OUT)], ["batch", "sequence", OUT])
    elif how == "no sequence":
        x = b.input("x", ["batch", IN])
        y = b.node("Gemm", [x, w, b.weight("b", OUT)], ["batch", OUT], module="m")
    else:
        x = b.input("x", ["batch", "sequence", IN])
        flat = b.node("Reshape", [x, b.constant("s", np.array([-1, IN]))], ["rows", IN])
        y = b.node("Gemm", [flat, w, b.weight("b", OUT)], ["rows", OUT], module="m")
    return b.model(b.node("Identity", [y], y.shape, name="y"))


HOWS = ["separate bias", "no sequence", "flattened"]


@pytest.mark.parametrize("how", HOWS)
def test_the_output_of_a_layer_is_scaled_and_shifted_per_row(how: str) -> None:
    model, base = _product(how), _product(how)
    w, b = (base.graph.initializers[name].const_value.numpy() for name in ("w", "b"))
    rows = numbers(3, IN) if how == "no sequence" else numbers(3, 5, IN)
    added = _inject(model)
    np.testing.assert_array_equal(added.biases["m.bias"], b)
    assert np.abs(run(model, {"x": rows}) - run(base, {"x": rows})).max() < 1e-6
    side: dict[str, Any] = {
        "m.lora_A": numbers(2, IN, 2, seed=1),
        "m.lora_B": numbers(2, 2, OUT, seed=2),
        "m.scale": numbers(2, OUT, seed=3),
        "m.offset": numbers(2, OUT, seed=4),
        "adapter_ids": SLOTS,
    }
    W = w + side["m.lora_A"] @ side["m.lora_B"]  # [slots, in, out]
    scale, offset = side["m.scale"], side["m.offset"]
    expected = np.stack(
        [
            scale[slot] * (row @ W[slot] + b) + offset[slot]
            for row, slot in zip(rows, SLOTS, strict=True)
        ]
    )
    result = run(model, {"x": rows, **side}).reshape(expected.shape)
    assert np.abs(result - expected).max() < 1e-4
    remove_side_inputs(model, manifest_of(added))
    assert ops(model) == ops(base)
    np.testing.assert_array_equal(run(model, {"x": rows}), run(base, {"x": rows}))


@pytest.mark.parametrize(
    ("scale", "offset", "names"),
    [
        (True, False, ["block.proj.scale"]),
        (False, True, ["block.proj.offset"]),
        (True, True, ["block.proj.scale", "block.proj.offset"]),
    ],
)
def test_scales_and_offsets_can_be_separate_or_combined(
    scale: bool, offset: bool, names: list[str]
) -> None:
    model, base = linear(), linear()
    added = _inject(model, scale=scale, offset=offset)
    inputs = [value.name for value in model.graph.inputs]
    assert inputs == ["x", "adapter_ids", *names, "block.proj.lora_A", "block.proj.lora_B"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    remove_side_inputs(model, manifest_of(added))
    assert ops(model) == ops(base)
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_a_norm_takes_an_offset() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    inputs = [x, b.weight("n", IN), b.weight("c", IN)]
    y = b.node("LayerNormalization", inputs, ["batch", "sequence", IN], module="norm")
    model = b.model(y)
    rows = numbers(3, 2, IN)
    before = run(model, {"x": rows})
    change = Change(find_parts(model)["norm"], scale=False, offset=True)
    added = inject_side_inputs(model, [], changes=[change])
    offset = numbers(2, IN, seed=4)
    result = run(model, {"x": rows, "norm.offset": offset, "adapter_ids": SLOTS})
    assert np.abs(result - (before + offset[SLOTS][:, None])).max() < 1e-5
    np.testing.assert_array_equal(added.biases["norm.bias"], inputs[2].const_value.numpy())


def _embedding(rows: str = "batch") -> ir.Model:
    b = Builder()
    ids = b.input("ids", ["batch", "sequence"], ir.DataType.INT64)
    if rows != "batch":
        ids = b.input("positions", [rows, "sequence"], ir.DataType.INT64)
    y = b.node(
        "Gather", [b.weight("t", VOCABULARY, IN), ids], [rows, "sequence", IN], module="embed"
    )
    return b.model(y)


def test_an_embedding_uses_the_factors_of_each_rows_adapter() -> None:
    model, base = _embedding(), _embedding()
    table = base.graph.initializers["t"].const_value.numpy()
    added = inject_side_inputs(model, [], embeddings=[find_parts(model)["embed"]])
    (target,) = added.targets
    assert (target.kind, target.in_features, target.out_features) == ("embedding", VOCABULARY, IN)
    ids = np.array([[0, 8, 3], [1, 1, 2], [4, 0, 7]])
    A, B = numbers(2, VOCABULARY, 2, seed=1), numbers(2, 2, IN, seed=2)
    side = {"embed.lora_A": A, "embed.lora_B": B}
    mixed = run(model, {"ids": ids, **side, "adapter_ids": SLOTS})
    alone = run(model, {"ids": ids, "embed.lora_A": A[1:], "embed.lora_B": B[1:]})
    for row, slot in enumerate(SLOTS):
        expected = table[ids[row]] + A[slot][ids[row]] @ B[slot]
        assert np.abs(mixed[row] - expected).max() < 1e-5
    assert np.abs(alone - (table[ids] + A[1][ids] @ B[1])).max() < 1e-5
    np.testing.assert_array_equal(run(model, {"ids": ids}), table[ids])
    remove_side_inputs(model, manifest_of(added))
    assert ops(model) == ["Gather"]


def test_an_embedding_of_indices_without_a_batch_axis_is_refused() -> None:
    model = _embedding("1")
    with pytest.raises(ExportError, match="embed is an embedding of ids .* merge the adapter"):
        inject_side_inputs(model, [], embeddings=[find_parts(model)["embed"]])
