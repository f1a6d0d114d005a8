from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.errors import AdapterMismatchError, ExportError
from loradeploy.export.match.linears import find_linears
from loradeploy.export.merge import MergeReport, merge_adapter
from tests.export.graphs import IN, OUT, Builder, linear, numbers, ops, run


def _adapter(module: str = "block.proj", *, into: int = IN, out: int = OUT) -> Adapter:
    return Adapter(
        config=AdapterConfig(r=2, lora_alpha=8, target_modules=(module,)),
        factors={module: Factors(A=numbers(2, into, seed=1), B=numbers(out, 2, seed=2))},
    )


def _merge(model: ir.Model, adapter: Adapter, *, requantize: bool = False) -> MergeReport:
    linears = find_linears(model).linears
    return merge_adapter(model, linears, adapter, requantize=requantize)


def _delta(adapter: Adapter, module: str) -> NDArray[np.float32]:
    pair = adapter.factors[module]
    delta: NDArray[np.float32] = 4 * (pair.B @ pair.A)  # [out, in]
    return delta


def test_a_merged_weight_is_the_base_plus_the_scaled_product() -> None:
    base, model, adapter = linear(), linear(), _adapter()
    report = _merge(model, adapter)
    x = numbers(2, 3, IN)
    expected = run(base, {"x": x}) + x @ _delta(adapter, "block.proj").T
    assert np.abs(run(model, {"x": x}) - expected).max() < 1e-5
    assert ops(model) == ops(base)
    assert dataclasses.replace(report, error=None) == MergeReport(("block.proj",), (), ())
    assert report.error is not None
    assert report.error.kept == 1


def test_merged_weights_are_computed_when_they_are_written_not_kept_in_memory() -> None:
    b = Builder()
    size, modules = 256, [f"m{number}" for number in range(6)]
    y = b.input("x", ["batch", size])
    for module in modules:
        y = b.node("MatMul", [y, b.weight(f"{module}.w", size, size)], module=module)
    model = b.model(y)
    pair = Factors(A=numbers(2, size, seed=1), B=numbers(size, 2, seed=2))
    config = AdapterConfig(r=2, lora_alpha=8, target_modules=tuple(modules))
    adapter = Adapter(config=config, factors=dict.fromkeys(modules, pair))
    before = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    tracemalloc.start()
    _merge(model, adapter)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    weight = 4 * size * size  # bytes
    assert kept < weight
    assert peak < 4 * weight
    update = _delta(adapter, "m0").T
    for name, value in model.graph.initializers.items():
        np.testing.assert_allclose(value.const_value.numpy(), before[name] + update, atol=1e-5)


@pytest.mark.parametrize("how", ["Gemm", "Transpose"])
def test_transposed_weights_are_merged_in_their_layout(how: str) -> None:
    b = Builder()
    x = b.input("x", ["batch", IN])
    w = b.weight("w", OUT, IN)
    if how == "Gemm":
        y = b.node("Gemm", [x, w], module="m", transB=1)
    else:
        y = b.node("MatMul", [x, b.node("Transpose", [w], perm=[1, 0])], module="m")
    model, adapter = b.model(y), _adapter("m")
    rows = numbers(3, IN)
    expected = run(model, {"x": rows}) + rows @ _delta(adapter, "m").T
    _merge(model, adapter)
    assert np.abs(run(model, {"x": rows}) - expected).max() < 1e-5
    assert tuple(model.graph.initializers["w"].const_value.shape) == (OUT, IN)


@pytest.mark.parametrize("through", ["Transpose", "nothing"])
def test_a_tied_weight_is_copied_and_the_embedding_is_not_changed(through: str) -> None:
    b = Builder()
    ids = b.input("ids", ["batch", "sequence"], ir.DataType.INT64)
    table = b.weight("table", OUT, IN)
    x = b.node("Gather", [table, ids], ["batch", "sequence", IN])
    if through == "Transpose":
        turned = b.node("Transpose", [table], perm=[1, 0])
        y = b.node("MatMul", [x, turned], ["batch", "sequence", OUT], module="head")
    else:
        flat = b.node("Reshape", [x, b.constant("s", np.array([-1, IN]))], ["rows", IN])
        y = b.node("Gemm", [flat, table], ["rows", OUT], module="head", transB=1)
    model, adapter = b.model(y), _adapter("head")
    tokens = np.array([[0, 3, 1]])
    before = table.const_value.numpy().copy()
    rows = before[tokens]
    report = _merge(model, adapter)
    result = run(model, {"ids": tokens}).reshape(rows.shape[0], rows.shape[1], OUT)
    expected = rows @ (before + _delta(adapter, "head")).T
    assert np.abs(result - expected).max() < 1e-5
    assert report.untied == ("head",)
    assert np.array_equal(model.graph.initializers["table"].const_value.numpy(), before)


def test_deduplicated_equal_weights_are_separated() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    w = b.weight("w", IN, IN)
    one = b.node("MatMul", [x, w], ["batch", "sequence", IN], module="one")
    two = b.node("MatMul", [one, w], ["batch", "sequence", IN], module="two")
    model, adapter = b.model(two), _adapter("two", out=IN)
    W = w.const_value.numpy()
    report = _merge(model, adapter)
    rows = numbers(2, 3, IN)
    expected = rows @ W @ (W + _delta(adapter, "two").T)
    assert np.abs(run(model, {"x": rows}) - expected).max() < 1e-4
    assert report.untied == ("two",)


def test_a_merge_in_half_precision_rounds_once() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN], ir.DataType.FLOAT16)
    exact = numbers(IN, OUT)
    w = b.constant("w", exact.astype(np.float16))
    y = b.node("MatMul", [x, w], module="m")
    y.dtype = ir.DataType.FLOAT16
    model, adapter = b.model(y), _adapter("m")
    merge_adapter(model, find_linears(model).linears, adapter, weights={"m": exact.T})
    expected = (exact + _delta(adapter, "m").T).astype(np.float16)
    assert np.array_equal(w.const_value.numpy(), expected)


def test_a_merged_weight_outside_the_range_of_half_precision_is_refused() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN], ir.DataType.FLOAT16)
    w = b.constant("w", np.full((IN, OUT), 65000, np.float16))
    y = b.node("MatMul", [x, w], module="m")
    adapter = Adapter(
        config=AdapterConfig(r=1, lora_alpha=1000, target_modules=("m",)),
        factors={"m": Factors(A=np.ones((1, IN), np.float32), B=np.ones((OUT, 1), np.float32))},
    )
    with pytest.raises(ExportError, match="m: the merged weight does not fit into float16"):
        _merge(b.model(y), adapter)


def test_one_error_lists_every_mismatch() -> None:
    adapter = Adapter(
        config=AdapterConfig(r=2, target_modules=("block.proj", "gone"), modules_to_save=("head",)),
        factors={
            "block.proj": Factors(A=numbers(2, IN + 1), B=numbers(OUT, 2)),
            "gone": Factors(A=numbers(2, IN), B=numbers(OUT, 2)),
        },
        saved={"head.weight": numbers(2, 2)},
    )
    with pytest.raises(AdapterMismatchError) as caught:
        _merge(linear(), adapter)
    message = str(caught.value)
    assert "block.proj.lora_A is [2, 7], the base takes 6" in message
    assert "gone is not a linear layer" in message
    assert "head.weight (modules_to_save) is not a parameter of this graph" in message


def test_a_merge_into_quantized_weights_is_refused() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", 32])
    packed = b.constant("w", np.zeros((OUT, 1, 16), np.uint8))
    y = b.node(
        "MatMulNBits", [x, packed, b.weight("s", OUT)], name="/m/q/MatMul", K=32, N=OUT, bits=4
    )
    with pytest.raises(ExportError, match=r"m\.q is already quantized"):
        _merge(b.model(y), _adapter("m.q", into=32))


@pytest.mark.parametrize("requantize", [False, True])
def test_a_merge_into_integer_weights_never_advises_requantize(requantize: bool) -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    weight = b.constant("w", np.ones((IN, OUT), np.int8))
    dequantized = b.node("DequantizeLinear", [weight, b.constant("s", np.float32(0.5))], [IN, OUT])
    y = b.node("MatMul", [x, dequantized], ["batch", "sequence", OUT], name="/m/q/MatMul")
    with pytest.raises(ExportError, match="use side inputs$") as raised:
        _merge(b.model(y), _adapter("m.q", into=IN), requantize=requantize)
    assert "`requantize`" not in str(raised.value)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_a_merge_into_float8_weights_needs_requantize(dtype: Any) -> None:
    def model() -> ir.Model:
        b = Builder()
        x = b.input("x", ["batch", "sequence", IN])
        stored = b.constant("w", numbers(IN, OUT).astype(dtype))
        w = b.node("Cast", [stored], [IN, OUT], to=ir.DataType.FLOAT)
        return b.model(b.node("MatMul", [x, w], ["batch", "sequence", OUT], module="m"))

    rows, small, large = numbers(2, 3, IN), _adapter("m"), _adapter("m")
    pair = small.factors["m"]
    small = dataclasses.replace(small, factors={"m": Factors(pair.A * 1e-3, pair.B)})
    with pytest.raises(ExportError, match=r"m is already quantized.*`requantize`"):
        _merge(model(), small)
    base = run(model(), {"x": rows})
    effect = (rows @ pair.A.T) @ pair.B.T * large.scaling("m")
    merged = model()
    error = _merge(merged, large, requantize=True).error
    assert error is not None
    assert error.kept == pytest.approx(1, abs=0.1)
    changed = run(merged, {"x": rows}) - base
    assert np.abs(changed - effect).max() < 0.2 * np.abs(effect).max(), "the adapter is not in it"
    error = _merge(model(), small, requantize=True).error
    assert error is not None
    assert abs(1 - error.kept) + error.noise > 0.5, (
        "an update of this size could be kept, and need not be refused"
    )


def test_saved_parameters_replace_those_of_the_base() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    scaled = b.node("Mul", [x, b.weight("norm.weight", IN)], ["batch", "sequence", IN])
    y = b.node("MatMul", [scaled, b.weight("w", IN, OUT)], ["batch", "sequence", OUT], module="m")
    model = b.model(y)
    norm, weight, bias = numbers(IN, seed=3), numbers(OUT, IN, seed=4), numbers(OUT, seed=5)
    adapter = Adapter(
        config=AdapterConfig(modules_to_save=("norm", "m")),
        factors={},
        saved={"norm.weight": norm, "m.weight": weight, "m.bias": bias},
    )
    _merge(model, adapter)
    rows = numbers(2, 3, IN)
    expected = (rows * norm) @ weight.T + bias
    assert np.abs(run(model, {"x": rows}) - expected).max() < 1e-5


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_convolution_is_merged_as_pytorch_computes_it(dora: bool) -> None:
    import torch

    from loradeploy.lora.inject import load

    net = torch.nn.Sequential()
    net.add_module("patches", torch.nn.Conv2d(3, 8, (2, 3), stride=2))
    weight, bias = (p.detach().numpy().copy() for p in net.patches.parameters())
    b = Builder()
    x = b.input("x", [1, 3, 6, 9])
    inputs = [x, b.constant("w", weight), b.constant("b", bias)]
    y = b.node("Conv", inputs, module="patches", strides=[2, 2])
    model = b.model(y)
    pair = Factors(
        A=numbers(2, 3, 2, 3, seed=1),
        B=numbers(8, 2, 1, 1, seed=2),
        magnitude=np.abs(numbers(8, seed=3)) if dora else None,
        kind="conv2d",
    )
    config = AdapterConfig(r=2, lora_alpha=8, target_modules=("patches",), use_dora=dora)
    adapter = Adapter(config, {"patches": pair})
    values = numbers(1, 3, 6, 9, seed=4)
    before = run(model, {"x": values})

    report = _merge(model, adapter)

    load(net, adapter)
    with torch.no_grad():
        expected = net(torch.tensor(values)).numpy()
    found = run(model, {"x": values})
    assert report.modules == ("patches",)
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(found - before).max() > 1
