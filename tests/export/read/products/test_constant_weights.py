"""A weight that the graph computes from constants is replaced by a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.export.graph.moves import MOVED
from loradeploy.export.match.products import products
from loradeploy.export.read.products import constant_weights
from loradeploy.export.read.products.constant_weights import compute_weights
from tests.export.graphs import IN, OUT, Builder, numbers, ops, run

W = numbers(IN, OUT, seed=4)
OTHER = numbers(IN, OUT, seed=5)


def integers(b: Builder, name: str, *values: int) -> ir.Value:
    return b.constant(name, np.array(values, np.int64))


def _gathered(b: Builder) -> ir.Value:
    layer = b.constant("layer", np.array(1, np.int64))
    return b.node("Gather", [b.constant("stack", np.stack([OTHER, W])), layer], axis=0)


def _sliced(b: Builder) -> ir.Value:
    packed = b.constant("packed", np.concatenate([OTHER, W], axis=1))
    spans = [integers(b, n, v) for n, v in (("from", OUT), ("to", 2 * OUT), ("axis", 1))]
    return b.node("Slice", [packed, *spans])


def _sliced_and_squeezed(b: Builder) -> ir.Value:
    stack = b.constant("stack", np.stack([OTHER, W]))
    spans = [integers(b, n, v) for n, v in (("from", -1), ("to", 2**31), ("axis", 0))]
    return b.node("Squeeze", [b.node("Slice", [stack, *spans]), integers(b, "first", 0)])


def _by_heads(b: Builder) -> ir.Value:
    heads = b.constant("heads", np.ascontiguousarray(W.T).reshape(2, OUT // 2, IN))
    flat = b.node("Reshape", [heads, integers(b, "shape", -1, IN)])
    return b.node("Transpose", [flat], perm=[1, 0])


def _joined(b: Builder) -> ir.Value:
    halves = [b.constant(n, half) for n, half in zip("lr", np.split(W, 2, axis=1), strict=True)]
    return b.node("Concat", halves, axis=1)


def _dequantized(b: Builder) -> ir.Value:
    """Integers from 0, minus a zero point, times a scale: all exact here."""
    low, scale = np.round(W * 16).min(), b.constant("scale", np.full(OUT, 1 / 16, np.float32))
    stored = b.constant("stored", (np.round(W * 16) - low).astype(np.uint8))
    shifted = b.node("Sub", [b.node("Cast", [stored], to=1), b.constant("zero", -low)])
    return b.node("Mul", [shifted, scale])


def _pruned(b: Builder) -> ir.Value:
    kept = b.constant("kept", np.ones_like(W, bool))
    return b.node("Where", [kept, b.constant("w", W), b.constant("none", np.float32(0))])


def _with_axis_of_batch(b: Builder) -> ir.Value:
    return b.node("Transpose", [b.constant("w", W.T[None])], perm=[0, 2, 1])


@pytest.mark.parametrize(
    "made",
    [
        *(_gathered, _sliced, _sliced_and_squeezed, _by_heads, _joined),
        *(_dequantized, _pruned, _with_axis_of_batch),
    ],
)
def test_a_weight_computed_from_constants_becomes_a_constant(
    made: Callable[[Builder], ir.Value],
) -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    model = b.model(b.node("MatMul", [x, made(b)], ["batch", "sequence", OUT], module="m"))
    feeds = {"x": numbers(2, 3, IN)}
    before = run(model, feeds)
    assert not list(products(model.graph))
    compute_weights(model.graph)
    assert ops(model) == ["MatMul"]
    (product,) = products(model.graph)
    expected = np.round(W * 16) / 16 if made is _dequantized else W
    assert np.array_equal(product.rows(list(range(OUT))), expected.T)
    assert np.array_equal(run(model, feeds), before)


def test_each_part_of_a_split_weight_becomes_a_constant() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    packed = b.constant("packed", np.concatenate([OTHER, W], axis=1))
    split = ir.node("Split", [packed, integers(b, "sizes", OUT, OUT)], {"axis": 1}, num_outputs=2)
    for index, part in enumerate(split.outputs):
        part.name = f"part{index}"
    b.nodes.append(split)
    ys = [
        b.node(
            "MatMul", [x, part], ["batch", "sequence", OUT], module=f"m{index}", name=f"y{index}"
        )
        for index, part in enumerate(split.outputs)
    ]
    model = b.model(*ys)
    compute_weights(model.graph)
    every = [product.rows(list(range(OUT))) for product in products(model.graph)]
    assert np.array_equal(every, [OTHER.T, W.T])


def test_a_weight_with_more_axes_than_its_input_is_not_changed() -> None:
    b = Builder()
    x = b.input("x", ["batch", IN])
    model = b.model(b.node("MatMul", [x, b.constant("w", W[None])], [1, "batch", OUT], module="m"))
    compute_weights(model.graph)
    assert not list(products(model.graph))


def test_a_weight_computed_from_an_input_is_not_changed() -> None:
    b = Builder()
    x, layer = b.input("x", ["batch", "sequence", IN]), b.input("layer", [], ir.DataType.INT64)
    w = b.node("Gather", [b.constant("stack", np.stack([OTHER, W])), layer], axis=0)
    model = b.model(b.node("MatMul", [x, w], ["batch", "sequence", OUT], module="m"))
    compute_weights(model.graph)
    assert ops(model) == ["Gather", "MatMul"]


def test_a_weight_can_be_any_number_of_nodes_away_from_its_constant() -> None:
    b = Builder()
    x, w, shape = b.input("x", [1, IN]), b.constant("w", W), integers(b, "shape", IN, OUT)
    for _ in range(1500):
        w = b.node("Reshape", [w, shape])
    model = b.model(b.node("MatMul", [x, w], [1, OUT], module="m"))
    compute_weights(model.graph)
    assert ops(model) == ["MatMul"]
    (product,) = products(model.graph)
    assert np.array_equal(product.rows(list(range(OUT))), W.T)


def test_nodes_shared_by_several_weights_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    b, layers, count = Builder(), 8, 0
    x: ir.Value = b.input("x", [1, OUT])
    stack = b.constant("stack", numbers(layers, OUT, OUT))
    turned = b.node("Transpose", [stack], perm=[0, 2, 1])
    for layer in range(layers):
        index = b.constant(f"index{layer}", np.array(layer, np.int64))
        w = b.node("Gather", [turned, index], axis=0)
        x = b.node("MatMul", [x, w], [1, OUT], module=f"m{layer}", name=f"x{layer}")
    model = b.model(x)
    feeds = {"x": numbers(1, OUT)}
    before, transpose = run(model, feeds), MOVED["Transpose"]

    def counted(*given: Any) -> Any:
        nonlocal count
        count += 1
        (result,) = transpose(*given)
        assert result.base is not None, "a copy of the stack"
        return [result]

    monkeypatch.setitem(constant_weights._COMPUTED, "Transpose", counted)
    compute_weights(model.graph)
    assert count == 1
    assert ops(model) == ["MatMul"] * layers
    assert np.array_equal(run(model, feeds), before)
