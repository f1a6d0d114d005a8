"""Computed sizes (Shape, Gather, …) are removed from traced graphs without changing results."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.export.graph.file import load_graph
from loradeploy.export.trace.cleanup.sizes import fold_sizes
from tests.export.graphs import Arrays, Builder, numbers, ops, run

INT64 = ir.DataType.INT64
HEADS, SIZE = 2, 4


def size(b: Builder, source: ir.Value, axis: int) -> ir.Value:
    """Return a dimension of `source` as a scalar."""
    shape = integers(b.node("Shape", [source], [1], start=axis, end=axis + 1))
    return integers(b.node("Squeeze", [shape], []))


def integers(value: ir.Value) -> ir.Value:
    value.dtype = INT64
    return value


@pytest.mark.parametrize("allowzero", [0, 1])
def test_a_reshape_to_sizes_of_its_input_gets_constant_sizes(allowzero: int) -> None:
    def model() -> ir.Model:
        b = Builder()
        x = b.input("x", ["batch", "sequence", HEADS * SIZE])
        flat = b.constant("flat", np.array([-1]))
        rest = b.constant("rest", np.array([HEADS, -1]))
        sizes = [b.node("Reshape", [size(b, x, axis), flat]) for axis in (0, 1)]
        shape = b.node("Concat", [*map(integers, sizes), rest], axis=0)
        split: list[int | str] = ["batch", "sequence", HEADS, SIZE]
        y = b.node("Reshape", [x, integers(shape)], split, name="y", allowzero=allowzero)
        return b.model(y)

    folded, x = model(), numbers(2, 3, HEADS * SIZE)
    fold_sizes(folded.graph)
    assert ops(folded) == ["Reshape"]
    assert folded.graph.initializers["shape.0x0x2x4"].const_value is not None
    np.testing.assert_array_equal(run(folded, {"x": x}), run(model(), {"x": x}))


def test_a_reshape_to_other_sizes_is_not_changed() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", SIZE])
    shape = b.input("shape", [3], INT64)
    model = b.model(b.node("Reshape", [x, shape], ["rows", "columns", SIZE], name="y"))
    fold_sizes(model.graph)
    feeds = {"x": numbers(2, 3, SIZE), "shape": np.array([3, 2, SIZE])}
    assert run(model, feeds).shape == (3, 2, SIZE)


def test_an_expand_without_effect_is_removed() -> None:
    b = Builder()
    x = b.input("x", ["batch", 1, SIZE])
    shape = b.input("shape", [3], INT64)
    same = b.node("Expand", [b.node("Neg", [x], ["batch", 1, SIZE]), shape], ["batch", 1, SIZE])
    wide = b.node("Expand", [same, shape], ["batch", "sequence", SIZE], name="y")
    model = b.model(wide)
    fold_sizes(model.graph)
    assert ops(model) == ["Neg", "Expand"]


@pytest.mark.parametrize("bundle", ["tiny_llama_bundle", "tiny_gpt2_bundle"])
def test_only_attention_reads_the_cache_of_a_decoder(
    bundle: str, request: pytest.FixtureRequest
) -> None:
    """Other readers of its sizes would prevent GroupQueryAttention."""
    graph = load_graph(request.getfixturevalue(bundle) / "model.onnx").graph
    caches = [value for value in graph.inputs if str(value.name).startswith("past_key_values")]
    assert len(caches) == 4
    for value in caches:
        assert [node.op_type for node, _ in value.uses()] == ["Concat"]


Compare = Callable[[Builder, ir.Value, ir.Value], ir.Value]


def causal(b: Builder, key: ir.Value, query: ir.Value) -> ir.Value:
    return b.node("LessOrEqual", [key, query])


def window(b: Builder, key: ir.Value, query: ir.Value) -> ir.Value:
    behind = b.node("Sub", [query, b.constant("window", np.array(3))])
    near = b.node("Greater", [key, integers(behind)])
    return b.node("And", [near, b.node("LessOrEqual", [key, query])])


def chunks(b: Builder, key: ir.Value, query: ir.Value) -> ir.Value:
    """Chunks depend on absolute positions: counted from the end they would differ."""
    length = b.constant("length", np.array(3))
    parts = [integers(b.node("Div", [value, length])) for value in (key, query)]
    return b.node("Equal", parts)


def mask(compare: Compare) -> ir.Model:
    """Return a mask [sequence, total] of a decoder with a cache, as floats."""
    b = Builder()
    ids = b.input("input_ids", ["batch", "sequence"], INT64)
    b.input("attention_mask", ["batch", "total"], INT64)
    past = b.input("past_key_values.0.key", ["batch", HEADS, "past", SIZE])
    zero, one = b.constant("zero", np.array(0)), b.constant("one", np.array(1))
    new, before = size(b, ids, 1), size(b, past, 2)
    total = integers(b.node("Add", [before, new], []))
    first = integers(b.node("Range", [zero, new, one], ["sequence"]))
    query = integers(b.node("Add", [first, before], ["sequence"]))
    key = integers(b.node("Range", [zero, total, one], ["total"]))
    axis = b.constant("axis", np.array([1]))
    query = integers(b.node("Unsqueeze", [query, axis], ["sequence", 1]))
    seen = compare(b, key, query)
    for node in b.nodes:
        if node.outputs[0].dtype == ir.DataType.FLOAT and node.op_type != "Cast":
            node.outputs[0].type = None
    return b.model(b.node("Cast", [seen], ["sequence", "total"], name="y", to=1))


@pytest.mark.parametrize(("past", "new"), [(0, 5), (4, 1), (5, 3)])
@pytest.mark.parametrize("compare", [causal, window, chunks])
def test_masks_are_the_same_without_the_length_of_the_cache(
    compare: Compare, past: int, new: int
) -> None:
    folded = mask(compare)
    fold_sizes(folded.graph)
    reads_past = any(value.uses() for value in folded.graph.inputs if "past" in str(value.name))
    assert reads_past == (compare is chunks)
    feeds: Arrays = {
        "input_ids": np.ones((2, new), np.int64),
        "attention_mask": np.ones((2, past + new), np.int64),
        "past_key_values.0.key": np.zeros((2, HEADS, past, SIZE), np.float32),
    }
    expected = run(mask(compare), feeds)
    np.testing.assert_array_equal(run(folded, feeds), expected)
    assert expected.shape == (new, past + new) and 0 < expected.mean() <= 1
