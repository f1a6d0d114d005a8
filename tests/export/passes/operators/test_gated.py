"""silu(gate) · up as one call, of two layers or of one fused product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.bundle.names import (
    LORA_SWIGLU_OPERATOR,
    OPERATOR_DOMAIN,
    SILU_MUL_OPERATOR,
    SWIGLU_OPERATOR,
)
from loradeploy.export.match.linears import find_linears
from loradeploy.export.passes.forms.branches import add_branches, remove_branches
from loradeploy.export.passes.fuse import fuse_products
from loradeploy.export.passes.operators.calls import remove_operators, use_operators
from loradeploy.export.passes.side_inputs.inject import inject_side_inputs
from tests.export.graphs import IN, OUT, Arrays, Builder, manifest_of, numbers, run, use_elsewhere
from tests.export.passes.operators.test_lora_add import with_library
from tests.export.passes.operators.test_standard import MERGED
from tests.tolerances import tolerance

FEEDS: Arrays = {"x": numbers(2, 3, IN)}


def gated(*, fused: bool = False, up_first: bool = False, out: int = OUT) -> ir.Model:
    """silu(x W_gate) · (x W_up)."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    shape: list[int | str] = ["batch", "sequence", OUT]
    gate, up = (
        b.node(
            "MatMul",
            [x, b.weight(f"{name}.w", IN, size)],
            [*shape[:2], size],
            module=f"mlp.{name}_proj",
            name=name,
        )
        for name, size in (("gate", OUT), ("up", out))
    )
    sigmoid = b.node("Sigmoid", [gate], shape, name="sigmoid")
    silu = b.node("Mul", [gate, sigmoid], shape, name="silu")
    y = b.node("Mul", [up, silu] if up_first else [silu, up], shape, name="y")
    model = b.model(y)
    if fused:
        fuse_products(model.graph, find_linears(model).linears.values())
    return model


def described(graph: ir.Graph) -> list[tuple[str, str | None, list[str | None], list[str | None]]]:
    return [
        (
            node.op_type,
            node.name,
            [None if value is None else value.name for value in node.inputs],
            [value.name for value in node.outputs],
        )
        for node in graph
    ]


@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize(
    ("fused", "operator"), [(False, SILU_MUL_OPERATOR), (True, SWIGLU_OPERATOR)]
)
def test_the_call_computes_its_nodes(
    fused: bool, operator: str, up_first: bool, operator_library: Path
) -> None:
    model = gated(fused=fused, up_first=up_first)
    expected = run(model, FEEDS)
    assert use_operators(model, MERGED) == (operator,)
    assert [n.op_type for n in model.graph if n.op_type != "MatMul"] == [operator]
    assert [value.name for value in model.graph.outputs] == ["y"]
    np.testing.assert_array_equal(run(model, FEEDS), expected)
    (found,) = with_library(model, operator_library, FEEDS).values()
    np.testing.assert_allclose(found, expected, atol=tolerance("torch-onnx-tiny"))
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("fused", [False, True])
def test_the_calls_can_be_removed(fused: bool) -> None:
    plain, model = gated(fused=fused), gated(fused=fused)
    remove_operators(model, use_operators(model, MERGED))
    kinds = [node.op_type for node in plain.graph]
    assert [node.op_type for node in model.graph] == kinds
    split = [each for each in described(plain.graph) if each[0] in ("MatMul", "Split")]
    assert [each for each in described(model.graph) if each[0] in ("MatMul", "Split")] == split
    assert model.graph.initializers.keys() == plain.graph.initializers.keys()
    assert all(v.shape == ir.Shape(["batch", "sequence", OUT]) for v in model.graph.outputs)
    np.testing.assert_array_equal(run(model, FEEDS), run(plain, FEEDS))


def test_calls_of_nodes_without_names_can_be_removed() -> None:
    b = Builder()
    y, shape = b.input("x", ["batch", "sequence", IN]), ["batch", "sequence", IN]
    for _ in range(2):
        silu = b.node("Mul", [y, b.node("Sigmoid", [y], [*shape])], [*shape])
        y = b.node("Mul", [silu, y], [*shape])
    model = b.model(y)
    for node in model.graph:
        node.name = ""  # as an exporter may leave them
    expected = run(model, FEEDS)
    remove_operators(model, use_operators(model, MERGED))
    assert not any(node.domain == OPERATOR_DOMAIN for node in model.graph)
    np.testing.assert_array_equal(run(model, FEEDS), expected)


def test_a_product_of_other_shapes_keeps_its_nodes() -> None:
    assert use_operators(gated(out=1), MERGED) == ()  # up is repeated


def test_a_product_of_unknown_shapes_keeps_its_nodes() -> None:
    model = gated()
    for node in model.graph:
        node.outputs[0].shape = ir.Shape([None, None, OUT])  # one of them may be repeated
    assert use_operators(model, MERGED) == ()


@pytest.mark.parametrize("by", ["the caller", "another node"])
def test_a_gate_that_is_used_elsewhere_too_keeps_its_product(by: str) -> None:
    model = gated(fused=True)
    (split,) = (node for node in model.graph if node.op_type == "Split")
    use_elsewhere(model, split.outputs[0], by)
    assert use_operators(model, MERGED) == (SILU_MUL_OPERATOR,)
    remove_operators(model, [SILU_MUL_OPERATOR])
    run(model, FEEDS)


@pytest.mark.parametrize("mode", [0, 1])
def test_the_base_branch_reads_the_fused_product_and_the_other_both_updates(mode: int) -> None:
    model = gated()
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    add_branches(model.graph)
    feeds = {**FEEDS, "adapter_mode": np.array([mode])}
    for name in ("gate", "up"):
        feeds[f"mlp.{name}_proj.lora_A"] = numbers(1, IN, 2, seed=1)
        feeds[f"mlp.{name}_proj.lora_B"] = numbers(1, 2, OUT, seed=2)
    expected = run(model, feeds)
    names = use_operators(model, manifest_of(added))
    assert names == (LORA_SWIGLU_OPERATOR, SWIGLU_OPERATOR)
    np.testing.assert_array_equal(run(model, feeds), expected)
    remove_operators(model, names)
    assert not any(node.domain == OPERATOR_DOMAIN for node in model.graph.all_nodes())
    np.testing.assert_array_equal(run(model, feeds), expected)
    remove_branches(model.graph)
    if mode:
        np.testing.assert_array_equal(
            run(model, {name: value for name, value in feeds.items() if name != "adapter_mode"}),
            expected,
        )
