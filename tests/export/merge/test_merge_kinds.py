"""Merging updates of other kinds than plain linear layers, on minimal graphs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.adapter.adapter import Adapter, Factors, Kind
from loradeploy.adapter.config import AdapterConfig
from loradeploy.errors import AdapterError, AdapterMismatchError
from loradeploy.export.match.linears import find_linears
from loradeploy.export.merge import MergeReport, merge_adapter
from tests.export.graphs import IN, OUT, Builder, linear, numbers, run

VOCABULARY = 9


def _merge(model: ir.Model, adapter: Adapter) -> MergeReport:
    return merge_adapter(model, find_linears(model).linears, adapter)


def _adapter(module: str, pair: Factors, **config: object) -> Adapter:
    values = {"r": pair.rank, "lora_alpha": 2 * pair.rank, "target_modules": (module,), **config}
    return Adapter(AdapterConfig(**values), {module: pair})  # type: ignore[arg-type]


def _pair(kind: Kind, A: tuple[int, ...], B: tuple[int, ...], *, dora: bool) -> Factors:
    magnitude = np.abs(numbers(B[0], seed=3)) + 0.5 if dora else None
    return Factors(numbers(*A, seed=1), numbers(*B, seed=2), magnitude, kind)


def _biased() -> ir.Model:
    """y = LayerNorm(x W + b)."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    shape: list[int | str] = ["batch", "sequence", OUT]
    product = b.node("MatMul", [x, b.weight("w", IN, OUT)], shape, module="m")
    total = b.node("Add", [product, b.weight("b", OUT)], shape)
    weight, bias = b.weight("n", OUT), b.weight("c", OUT)
    return b.model(b.node("LayerNormalization", [total, weight, bias], shape, module="norm"))


@pytest.mark.parametrize("transposed", [False, True])
def test_dora_scales_the_rows_of_the_merged_weight(transposed: bool) -> None:
    b = Builder()
    x = b.input("x", ["batch", IN])
    if transposed:
        w = b.weight("w", OUT, IN)
        y = b.node("Gemm", [x, w, b.weight("b", OUT)], module="m", transB=1)
        W = w.const_value.numpy().copy()
    else:
        w = b.weight("w", IN, OUT)
        y = b.node("MatMul", [x, w], module="m")
        W = w.const_value.numpy().T.copy()
    model = b.model(y)
    pair = _pair("linear", (2, IN), (OUT, 2), dora=True)
    _merge(model, _adapter("m", pair, use_dora=True))
    V = W + 2 * pair.B @ pair.A
    expected = pair.magnitude[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)
    merged = w.const_value.numpy() if transposed else w.const_value.numpy().T
    assert np.abs(merged - expected).max() < 1e-6


@pytest.mark.parametrize("dora", [False, True])
def test_an_embedding_is_merged_and_a_tied_head_is_not_changed(dora: bool) -> None:
    b = Builder()
    ids = b.input("ids", ["batch", "sequence"], ir.DataType.INT64)
    table = b.weight("table", VOCABULARY, IN)
    x = b.node("Gather", [table, ids], ["batch", "sequence", IN], module="embed")
    turned = b.node("Transpose", [table], perm=[1, 0])
    model = b.model(b.node("MatMul", [x, turned], module="head"))
    W = table.const_value.numpy().copy()
    pair = _pair("embedding", (2, VOCABULARY), (IN, 2), dora=dora)
    report = _merge(model, _adapter("embed", pair, use_dora=dora))
    changed = W + 2 * (pair.B @ pair.A).T
    if dora:
        changed *= pair.magnitude / np.linalg.norm(changed, axis=0)
    tokens = np.array([[0, 3, 1, 8]])
    assert np.abs(run(model, {"ids": tokens}) - changed[tokens] @ W.T).max() < 1e-4
    assert report.untied == ("embed",)


@pytest.mark.parametrize("dora", [False, True])
def test_a_convolution_is_merged(dora: bool) -> None:
    b = Builder()
    x = b.input("x", ["batch", 3, "height", "width"])
    w = b.weight("w", OUT, 3, 2, 2)
    model = b.model(b.node("Conv", [x, w], module="vision.patch", kernel_shape=[2, 2]))
    W = w.const_value.numpy().copy()
    pair = _pair("conv2d", (2, 3, 2, 2), (OUT, 2, 1, 1), dora=dora)
    _merge(model, _adapter("vision.patch", pair, use_dora=dora))
    update = 2 * (pair.B[:, :, 0, 0] @ pair.A.reshape(2, -1)).reshape(W.shape)
    expected = W + update
    if dora:
        norm = np.linalg.norm(expected.reshape(OUT, -1), axis=1)
        expected *= (pair.magnitude / norm)[:, None, None, None]
    assert np.abs(w.const_value.numpy() - expected).max() < 1e-5
    assert run(model, {"x": numbers(1, 3, 4, 4)}).shape == (1, OUT, 3, 3)


def test_a_grouped_convolution_is_refused() -> None:
    b = Builder()
    x = b.input("x", ["batch", 4, "height", "width"])
    y = b.node("Conv", [x, b.weight("w", OUT, 2, 1, 1)], module="m", group=2)
    pair = Factors(numbers(4, 4, 1, 1), numbers(OUT, 2, 1, 1), kind="conv2d")
    with pytest.raises(AdapterError, match="convolution of 2 groups"):
        _merge(b.model(y), _adapter("m", pair))


def test_trained_biases_replace_those_of_the_base() -> None:
    model, rows = _biased(), numbers(2, 3, IN)
    new = {"m.bias": numbers(OUT, seed=5), "norm.bias": numbers(OUT, seed=6)}
    config = AdapterConfig(bias="all", target_modules=())
    _merge(model, Adapter(config, {}, new))
    held = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    assert set(held) == {"w", "n", "m.bias.new", "norm.bias.new"}
    y = rows @ held["w"] + new["m.bias"]
    centered = y - y.mean(-1, keepdims=True)
    expected = centered / np.sqrt(y.var(-1, keepdims=True) + 1e-5) * held["n"] + new["norm.bias"]
    assert np.abs(run(model, {"x": rows}) - expected).max() < 1e-4


def test_a_bias_that_the_graph_lacks_is_added() -> None:
    model, rows, bias = linear(), numbers(2, 3, IN), numbers(OUT, seed=5)
    before = run(model, {"x": rows})
    _merge(model, Adapter(AdapterConfig(bias="all"), {}, {"block.proj.bias": bias}))
    assert np.abs(run(model, {"x": rows}) - (before + bias)).max() < 1e-6


def test_a_bias_shared_by_two_layers_is_separated() -> None:
    b = Builder()
    x = b.input("x", ["batch", IN])
    shared = b.weight("b", IN)
    one = b.node("Gemm", [x, b.weight("w1", IN, IN), shared], ["batch", IN], module="one")
    two = b.node("Gemm", [one, b.weight("w2", IN, IN), shared], ["batch", IN], module="two")
    model, rows, bias = b.model(two), numbers(3, IN), numbers(IN, seed=5)
    w1, w2 = (model.graph.initializers[name].const_value.numpy() for name in ("w1", "w2"))
    old = shared.const_value.numpy()
    _merge(model, Adapter(AdapterConfig(bias="all"), {}, {"two.bias": bias}))
    expected = (rows @ w1 + old) @ w2 + bias
    assert np.abs(run(model, {"x": rows}) - expected).max() < 1e-4


def test_one_error_lists_everything_that_is_missing() -> None:
    adapter = Adapter(
        AdapterConfig(r=2, bias="all", target_modules=("embed", "patch")),
        {
            "embed": _pair("embedding", (2, 3), (IN, 2), dora=False),
            "patch": _pair("conv2d", (2, 3, 2, 2), (OUT, 2, 1, 1), dora=False),
        },
        {"norm.bias": numbers(4)},
    )
    with pytest.raises(AdapterMismatchError) as refusal:
        _merge(linear(), adapter)
    for message in (
        "embed is not an embedding of this graph",
        "patch is not a convolution of this graph",
        "norm.bias (a trained bias) is not a parameter of this graph",
    ):
        assert message in str(refusal.value)


def test_factors_of_another_size_are_reported_with_both_sizes() -> None:
    b = Builder()
    ids = b.input("ids", ["batch", "sequence"], ir.DataType.INT64)
    model = b.model(b.node("Gather", [b.weight("t", VOCABULARY, IN), ids], module="embed"))
    pair = _pair("embedding", (2, VOCABULARY + 1), (IN, 2), dora=False)
    with pytest.raises(AdapterMismatchError, match=r"embed.lora_A is \[2, 10\], the base takes 9"):
        _merge(model, _adapter("embed", pair))


def test_an_adapter_trained_on_a_modified_base_is_refused_with_the_conversion() -> None:
    pair = _pair("linear", (2, IN), (OUT, 2), dora=False)
    with pytest.raises(AdapterError, match="'olora'.*loradeploy convert ADAPTER --model BASE"):
        _merge(linear(), _adapter("block.proj", pair, init_lora_weights="olora"))
