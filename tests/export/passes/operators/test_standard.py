"""Calls that stand for one standard node: which nodes become calls, and that they compute it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.bundle.names import (
    ATTENTION_OPERATOR,
    GROUP_QUERY_ATTENTION_OPERATOR,
    LORA_ADD_OPERATOR,
    MAT_MUL_N_BITS_OPERATOR,
    OPERATOR_DOMAIN,
)
from loradeploy.errors import ExportError
from loradeploy.export.match.linears import find_linears
from loradeploy.export.passes.forms.branches import add_branches, remove_branches
from loradeploy.export.passes.operators.calls import remove_operators, use_operators
from loradeploy.export.passes.side_inputs.inject import SideInputs, inject_side_inputs
from tests.export.graphs import Arrays, Builder, manifest_of, numbers, ops, run

INTO, OUT, HEADS, SIZE = 32, 6, 4, 8
MICROSOFT = "com.microsoft"


def packed(
    *, zeros: type | None = None, dtype: ir.DataType = ir.DataType.FLOAT, **more: Any
) -> ir.Model:
    """One MatMulNBits of 4 bits."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", INTO], dtype)
    kind = dtype.numpy()
    random = np.random.default_rng(3)
    B = b.constant("B", random.integers(0, 256, (OUT, 1, 16), np.uint8))
    scales = b.constant("scales", random.uniform(0.1, 1, (OUT, 1)).astype(kind))
    inputs = [x, B, scales]
    if zeros is not None:
        inputs.append(b.constant("zeros", random.integers(0, 256, (OUT, 1)).astype(zeros)))
    sizes = {"K": INTO, "N": OUT, "bits": 4, "block_size": 32, "accuracy_level": 4}
    attributes = {name: value for name, value in {**sizes, **more}.items() if value is not None}
    y = b.node(
        "MatMulNBits",
        inputs,
        ["batch", "sequence", OUT],
        module="block.proj",
        domain=MICROSOFT,
        **attributes,
    )
    y.type = ir.TensorType(dtype)
    return with_microsoft(b.model(y))


def attended(*, mask: ir.DataType | None = ir.DataType.BOOL, **more: Any) -> ir.Model:
    """One Attention with heads first."""
    b = Builder()
    q = b.input("q", ["batch", HEADS, "sequence", SIZE])
    k, v = (b.input(name, ["batch", HEADS // 2, "total", SIZE]) for name in "kv")
    masks = [] if mask is None else [b.input("mask", ["batch", 1, "sequence", "total"], mask)]
    shape: list[int | str] = ["batch", HEADS, "sequence", SIZE]
    y = b.node("Attention", [q, k, v, *masks], shape, **{"scale": 0.3, **more})
    return with_microsoft(b.model(y))


def grouped(**more: Any) -> ir.Model:
    """One GroupQueryAttention with a cache."""
    b = Builder()
    q = b.input("q", ["batch", "sequence", HEADS * SIZE])
    k, v = (b.input(name, ["batch", "sequence", SIZE]) for name in "kv")
    past = [b.input(name, ["batch", 1, "past", SIZE]) for name in ("past_k", "past_v")]
    last = b.input("last", ["batch"], ir.DataType.INT32)
    total = b.input("total", [], ir.DataType.INT32)
    attributes = {"num_heads": HEADS, "kv_num_heads": 1, "scale": 0.3, **more}
    node = ir.node(
        "GroupQueryAttention",
        [q, k, v, *past, last, total],
        attributes=attributes,
        domain=MICROSOFT,
        num_outputs=3,
        name="grouped",
    )
    for output, name in zip(node.outputs, ("y", "k_all", "v_all"), strict=True):
        output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape(["batch", "?", "?", "?"][: 3 if name == "y" else 4])
    b.nodes.append(node)
    return with_microsoft(b.model(*node.outputs))


def with_outputs(model: ir.Model, *names: str) -> ir.Model:
    """The node has outputs of these names; that of "" is left out."""
    (node,) = model.graph
    del model.graph.outputs[1:]
    node.resize_outputs(len(names))
    for output, name in zip(node.outputs, names, strict=True):
        output.name = name
    return model


def with_microsoft(model: ir.Model) -> ir.Model:
    model.graph.opset_imports[MICROSOFT] = 1
    model.graph.opset_imports[""] = 23
    return model


FEEDS: dict[str, Arrays] = {
    MAT_MUL_N_BITS_OPERATOR: {"x": numbers(2, 3, INTO)},
    ATTENTION_OPERATOR: {
        "q": numbers(2, HEADS, 3, SIZE, seed=1),
        "k": numbers(2, HEADS // 2, 5, SIZE, seed=2),
        "v": numbers(2, HEADS // 2, 5, SIZE, seed=3),
        "mask": np.tril(np.ones((2, 1, 3, 5), bool), 2),
    },
    GROUP_QUERY_ATTENTION_OPERATOR: {
        "q": numbers(2, 1, HEADS * SIZE, seed=1),
        "k": numbers(2, 1, SIZE, seed=2),
        "v": numbers(2, 1, SIZE, seed=3),
        "past_k": numbers(2, 1, 4, SIZE, seed=4),
        "past_v": numbers(2, 1, 4, SIZE, seed=5),
        "last": np.array([4, 4], np.int32),
        "total": np.array(5, np.int32),
    },
}
GRAPHS: dict[str, Callable[..., ir.Model]] = {
    MAT_MUL_N_BITS_OPERATOR: packed,
    ATTENTION_OPERATOR: attended,
    GROUP_QUERY_ATTENTION_OPERATOR: grouped,
}
# A manifest of a graph without side inputs.
MERGED = dataclasses.replace(
    manifest_of(SideInputs(targets=(), saved=(), defaults={}, dtype="float32")), mode="merged"
)
OPERATORS = pytest.mark.parametrize("operator", GRAPHS)


@OPERATORS
def test_a_call_without_a_library_is_the_standard_node_bit_for_bit(operator: str) -> None:
    model, feeds = GRAPHS[operator](), FEEDS[operator]
    expected = run(model, feeds)
    assert use_operators(model, MERGED) == (operator,)
    assert {(node.domain, node.op_type) for node in model.graph} == {(OPERATOR_DOMAIN, operator)}
    np.testing.assert_array_equal(run(model, feeds), expected)
    if operator == ATTENTION_OPERATOR:  # the mask has an effect
        assert (
            np.abs(run(model, {**feeds, "mask": feeds["mask"][:, :, ::-1]}) - expected).max() > 0.1
        )


@OPERATORS
def test_attributes_and_inputs_that_are_optional_are_those_of_the_node(operator: str) -> None:
    few = {
        MAT_MUL_N_BITS_OPERATOR: lambda: packed(bits=None, zeros=np.uint8),  # 4 bits by default
        ATTENTION_OPERATOR: lambda: attended(mask=None),
        GROUP_QUERY_ATTENTION_OPERATOR: lambda: grouped(softcap=5.0),
    }
    model = few[operator]()
    feeds = {name: value for name, value in FEEDS[operator].items() if name != "mask"}
    expected = run(model, feeds)
    use_operators(model, MERGED)
    np.testing.assert_array_equal(run(model, feeds), expected)


def test_calls_with_and_without_an_input_have_one_function() -> None:
    b = Builder()
    shape: list[int | str] = ["batch", HEADS, "sequence", SIZE]
    q = b.input("q", shape)
    mask = b.input("mask", ["batch", 1, "sequence", "sequence"], ir.DataType.BOOL)
    masked = b.node("Attention", [q, q, q, mask], shape, name="masked", scale=0.5)
    model = b.model(b.node("Attention", [masked, q, q], shape, name="y", softcap=2.0))
    model.graph.opset_imports[""] = 23
    feeds = {"q": numbers(2, HEADS, 3, SIZE), "mask": np.tril(np.ones((2, 1, 3, 3), bool))}
    expected = run(model, feeds)
    assert use_operators(model, MERGED) == (ATTENTION_OPERATOR,)
    assert len(model.functions) == 1
    np.testing.assert_array_equal(run(model, feeds), expected)


@OPERATORS
def test_calls_can_be_undone(operator: str) -> None:
    plain, model = GRAPHS[operator](), GRAPHS[operator]()
    remove_operators(model, use_operators(model, MERGED))
    expected, found = (list(each.graph) for each in (plain, model))
    assert [(n.domain, n.op_type, n.name) for n in found] == [
        (n.domain, n.op_type, n.name) for n in expected
    ]
    assert [n.attributes for n in found] == [n.attributes for n in expected]
    assert not model.functions
    assert OPERATOR_DOMAIN not in model.graph.opset_imports
    np.testing.assert_array_equal(run(model, FEEDS[operator]), run(plain, FEEDS[operator]))


def test_a_graph_with_other_calls_than_its_manifest_lists_is_refused() -> None:
    model = packed()
    use_operators(model, MERGED)
    with pytest.raises(ExportError, match="has calls of MatMulNBits, its manifest lists Attention"):
        remove_operators(model, [ATTENTION_OPERATOR])


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: packed(zeros=np.float32), id="zero points in floats"),
        pytest.param(lambda: packed(block_size=16), id="blocks of 16"),
        pytest.param(lambda: packed(accuracy_level=None), id="activations in float32"),
        pytest.param(lambda: packed(accuracy_level=1), id="another level of accuracy"),
        pytest.param(lambda: packed(bits=2), id="two bits"),
        pytest.param(lambda: packed(dtype=ir.DataType.FLOAT16), id="products in float16"),
        pytest.param(lambda: attended(is_causal=1), id="a causal attention without a mask"),
        pytest.param(lambda: attended(mask=ir.DataType.FLOAT16), id="a mask in float16"),
        pytest.param(lambda: attended(softmax_precision=10), id="a softmax in float16"),
        pytest.param(lambda: with_outputs(attended(), "y", "keys"), id="a cache of its own"),
        pytest.param(lambda: with_outputs(attended(), "y", "", ""), id="outputs that are left out"),
        pytest.param(lambda: with_outputs(grouped(), "y"), id="a cache that is not returned"),
        pytest.param(lambda: with_outputs(grouped(), "y", "", ""), id="a cache that is left out"),
        pytest.param(lambda: grouped(do_rotary=1), id="rotary embeddings"),
        pytest.param(lambda: grouped(local_window_size=3), id="a window"),
    ],
)
def test_a_node_that_no_kernel_computes_stays(model: Callable[[], ir.Model]) -> None:
    made = model()
    assert use_operators(made, MERGED) == ()
    assert OPERATOR_DOMAIN not in {node.domain for node in made.graph}
    assert not made.functions
    assert OPERATOR_DOMAIN not in made.graph.opset_imports


def test_a_weight_that_is_fed_stays() -> None:
    model = packed()
    model.graph.inputs.append(model.graph.initializers["B"])
    assert use_operators(model, MERGED) == ()


@pytest.mark.parametrize("mode", [0, 1])
def test_nodes_in_branches_are_calls_too(mode: int) -> None:
    model = packed()
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    add_branches(model.graph)
    feeds = {
        **FEEDS[MAT_MUL_N_BITS_OPERATOR],
        "block.proj.lora_A": numbers(1, INTO, 2, seed=1),
        "block.proj.lora_B": numbers(1, 2, OUT, seed=2),
        "adapter_mode": np.array([mode]),
    }
    before, bodies = run(model, feeds), called_in(model, MICROSOFT)
    assert bodies == [["MatMulNBits"], ["MatMulNBits"]]
    names = use_operators(model, manifest_of(added))
    assert names == (LORA_ADD_OPERATOR, MAT_MUL_N_BITS_OPERATOR)
    assert called_in(model, OPERATOR_DOMAIN) == [["MatMulNBits", "LoraAdd"], ["MatMulNBits"]]
    np.testing.assert_array_equal(run(model, feeds), before)
    remove_operators(model, names)
    remove_branches(model.graph)
    assert ops(model) == ["MatMulNBits", "Gather", "Gather", "MatMul", "MatMul", "Add"]
    if mode:
        np.testing.assert_array_equal(
            run(model, {name: value for name, value in feeds.items() if name != "adapter_mode"}),
            before,
        )


def called_in(model: ir.Model, domain: str) -> list[list[str]]:
    """The operators of the domain in each body, the adapted one first."""
    (choice,) = (node for node in model.graph if node.op_type == "If")
    return [
        [node.op_type for node in choice.attributes[name].as_graph() if node.domain == domain]
        for name in ("then_branch", "else_branch")
    ]
