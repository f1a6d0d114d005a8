"""A bias fused into the operator after its product is found and becomes a separate Add again."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from loradeploy.export.match.linears import find_linears
from loradeploy.export.match.operators import MICROSOFT
from loradeploy.export.match.whole.biases import fused_bias, hides_bias, separate_biases
from tests.export.graphs import Builder, numbers, run
from tests.tolerances import tolerance

IN, OUT = 24, 16
W = numbers(OUT, IN, seed=1)
Arrays = dict[str, NDArray[Any]]


def fused(op: str, bias: NDArray[np.float32]) -> ir.Model:
    """Return a graph of a product whose bias is an input of the operator after it."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    y = b.node("MatMul", [x, b.constant("w", W.T.copy())], ["batch", "sequence", OUT], module="m")
    own = b.constant("b", bias)
    if op in ("BiasGelu", "FastGelu"):
        z = b.node(op, [y, own])
    else:
        skip = b.input("skip", ["batch", "sequence", OUT])
        norms = [b.weight("gamma", OUT)]
        norms += [b.weight("beta", OUT)] if op == "SkipLayerNormalization" else []
        z = b.node(op, [y, skip, *norms, own])
    b.nodes[-1].domain = "com.microsoft"
    model = b.model(z)
    model.graph.opset_imports["com.microsoft"] = 1
    return model


@pytest.mark.parametrize(
    "op",
    ["BiasGelu", "FastGelu", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"],
)
def test_a_fused_bias_is_found_and_becomes_a_separate_add(op: str) -> None:
    bias = numbers(OUT, seed=6)
    model = fused(op, bias)
    feeds: Arrays = {"x": numbers(2, 3, IN), "skip": numbers(2, 3, OUT, seed=1)}
    feeds = {value.name: feeds[value.name] for value in model.graph.inputs if value.name}
    before = run(model, feeds)
    linears = find_linears(model).linears
    assert linears["m"].bias is None
    seen = fused_bias(linears["m"].nodes[0], OUT)
    assert seen is not None and (seen.numbers == bias).all()
    apart = separate_biases(model.graph, linears, ["m"])["m"]
    assert apart.bias is not None and apart.bias.const_value is not None
    assert (apart.bias.const_value.numpy() == bias).all()
    assert np.abs(run(model, feeds) - before).max() < tolerance("torch-onnx-tiny")


@pytest.mark.parametrize("behind", ["Reshape", "Unknown", "Relu"])
def test_a_layer_before_an_operator_that_may_hide_a_bias_does_not_count_as_without_one(
    behind: str,
) -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    y = b.node("MatMul", [x, b.constant("w", W.T.copy())], module="m")
    if behind == "Reshape":
        shape = b.constant("shape", np.array([0, 0, 2, OUT // 2], np.int64))
        z = b.node("Add", [b.node("Reshape", [y, shape]), b.weight("b", 2, OUT // 2)])
    else:
        z = b.node(behind, [y])
        b.nodes[-1].domain = "com.microsoft" if behind == "Unknown" else ""
    product = find_linears(b.model(z)).linears["m"].nodes[0]
    assert hides_bias(product, OUT) == (behind != "Relu")


@pytest.mark.parametrize("second", [OUT, 2])
def test_a_bias_in_two_constants_counts_as_hidden(second: int) -> None:
    b = Builder()
    y = b.node("MatMul", [b.input("x", ["batch", IN]), b.weight("w", IN, OUT)], module="m")
    y = b.node("Add", [y, b.weight("b", OUT)])
    y = b.node("Add", [b.weight("c", *([OUT] if second == OUT else [second, OUT])), y])
    product = find_linears(b.model(y)).linears["m"].nodes[0]
    assert hides_bias(product, OUT) == (second == OUT)


@pytest.mark.parametrize("modules", [["q"], ["k", "q"], ["k", "q", "v"]], ids=",".join)
def test_a_fused_bias_of_several_layers_becomes_one_add_per_layer(modules: list[str]) -> None:
    """MultiHeadAttention has the biases of q, k and v as one concatenated constant."""
    b, biases = Builder(), numbers(3, OUT, seed=6)
    x = b.input("x", [2, 3, IN])
    parts = [
        b.node("MatMul", [x, b.weight(f"w{name}", IN, OUT)], [2, 3, OUT], module=name)
        for name in "qkv"
    ]
    joint = b.constant("b", biases.reshape(-1))
    model = b.model(b.node("MultiHeadAttention", [*parts, joint], domain=MICROSOFT, num_heads=2))
    model.graph.opset_imports[MICROSOFT] = 1
    feeds: Arrays = {"x": numbers(2, 3, IN)}
    before = run(model, feeds)
    linears = separate_biases(model.graph, find_linears(model).linears, modules)
    for name, bias in zip("qkv", biases, strict=True):
        own = linears[name].bias
        assert own is not None and own.const_value is not None, name
        assert (own.const_value.numpy() == bias).all()
    assert np.abs(run(model, feeds) - before).max() < tolerance("torch-onnx-tiny")
