"""Quantization of weights to 8 and 4 bits, on minimal graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from loradeploy.errors import ExportError
from loradeploy.export.match.linears import find_linears
from loradeploy.export.passes.precision.quantize import quantize, requantize_product, rounded
from loradeploy.export.passes.side_inputs.inject import SideInputs, inject_side_inputs
from tests.export.graphs import Builder, manifest_of, numbers, ops, run

IN, OUT = 64, 32
EMPTY = SideInputs((), (), {}, "float32")
each_width = pytest.mark.parametrize("bits", [8, 4])


def products(*kinds: str) -> ir.Model:
    """Return a chain of products with W0, W1, …: MatMul, or Gemm with a bias."""
    b = Builder()
    y = b.input("x", ["batch", IN])
    into = IN
    for number, kind in enumerate(kinds):
        inputs = [y, b.weight(f"w{number}", into, OUT)]
        if kind == "Gemm":
            inputs.append(b.weight(f"b{number}", OUT))
        y = b.node(kind, inputs, ["batch", OUT], module=f"m{number}", name=f"y{number}")
        into = OUT
    return b.model(y)


def weight(model: ir.Model, name: str = "w0") -> NDArray[Any]:
    value: NDArray[Any] = model.graph.initializers[name].const_value.numpy()
    return value


@each_width
def test_a_product_becomes_block_quantized_and_computes_with_the_rounded_weight(
    bits: int,
) -> None:
    model, x = products("MatMul"), numbers(3, IN)
    W = weight(model)
    expected = x @ rounded(np.ascontiguousarray(W.T), bits).T
    quantize(model, manifest_of(EMPTY), bits)
    assert ops(model) == ["MatMulNBits"]
    (node,) = model.graph
    assert node.attributes["bits"].as_int() == bits
    assert node.attributes["block_size"].as_int() == 32
    assert [value.name for value in model.graph.outputs] == ["y0"]
    assert list(model.graph.initializers) == [f"m0.weight.int{bits}", f"m0.weight.int{bits}.scales"]
    # Activations are quantized to 8 bits too.
    size = np.abs(expected).max()
    assert np.abs(run(model, {"x": x}) - expected).max() < 0.02 * size
    assert np.abs(expected - x @ W).max() > 0


@each_width
def test_rounding_is_within_half_a_step_of_each_block(bits: int) -> None:
    W = numbers(OUT, IN)
    blocks = W.reshape(OUT, -1, 32)
    step = np.abs(blocks).max(axis=-1, keepdims=True) / (1 << (bits - 1))
    error = np.abs(rounded(W, bits).reshape(blocks.shape) - blocks)
    assert (error <= step * 1.001).all()
    assert (error > step * 0.4).any()


def test_a_product_with_its_own_bias_is_not_quantized() -> None:
    model = products("MatMul", "Gemm")
    quantize(model, manifest_of(EMPTY), 4)
    assert ops(model) == ["MatMulNBits", "Gemm"]
    assert "w1" in model.graph.initializers


def test_a_graph_with_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(ExportError, match="no product that could be quantized to int4"):
        quantize(products("Gemm"), manifest_of(EMPTY), 4)


def test_the_manifest_names_the_new_weight_and_factors_are_not_quantized() -> None:
    model, x = products("MatMul"), numbers(2, IN)
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    manifest = quantize(model, manifest_of(added), 8)
    (target,) = manifest.targets
    assert (target.weight, target.transposed) == ("m0.weight.int8", True)
    assert sorted(op for op in ops(model) if "MatMul" in op) == ["MatMul", "MatMul", "MatMulNBits"]
    A, B = numbers(1, IN, 2, seed=1), numbers(1, 2, OUT, seed=2)
    base = run(model, {"x": x})
    adapted = run(model, {"x": x, "m0.lora_A": A, "m0.lora_B": B})
    np.testing.assert_allclose(adapted - base, x @ A[0] @ B[0], atol=1e-4)


@each_width
def test_a_weight_that_is_quantized_again_keeps_its_bits_and_block_size(bits: int) -> None:
    model = products("MatMul")
    quantize(model, manifest_of(EMPTY), bits)
    other = numbers(OUT, IN, seed=9)
    (node,) = model.graph
    before = dict(node.attributes)
    requantize_product(node, model.graph, other)
    assert dict(node.attributes) == before
    x = numbers(3, IN)
    expected = x @ rounded(other, bits).T
    assert np.abs(run(model, {"x": x}) - expected).max() < 0.02 * np.abs(expected).max()
