"""Linear layers whose features are not the last axis of their input take adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.export.match.linears import find_linears
from loradeploy.export.merge import merge_adapter
from loradeploy.export.read.products.channels_first import features_last, matrices_of
from tests.export.graphs import IN, OUT, Builder, numbers, ops, run

POSITIONS, BATCH = 5, 2
WEIGHTS = {"MatMul": (), "Conv of one axis": (1,), "Conv of two axes": (1, 1)}
SIZES: dict[str, tuple[int, ...]] = {
    "MatMul": (POSITIONS,),
    "Conv of one axis": (POSITIONS,),
    "Conv of two axes": (1, POSITIONS),
}
PAIR = Factors(numbers(2, IN, seed=5), numbers(OUT, 2, seed=6))
ADAPTER = Adapter(AdapterConfig(r=2, lora_alpha=4, target_modules=("proj",)), {"proj": PAIR})


def _model(kind: str, *, bias: bool = False, module: str | None = "proj") -> ir.Model:
    b = Builder()
    x = b.input("x", [BATCH, IN, *SIZES[kind]])
    w = b.weight("w", OUT, IN, *WEIGHTS[kind])
    given = [w, x] if kind == "MatMul" else [x, w, *([b.weight("b", OUT)] if bias else [])]
    return b.model(b.node(kind.split()[0], given, [BATCH, OUT, *SIZES[kind]], module=module))


def _expected(model: ir.Model, x: NDArray[np.float32], update: float) -> NDArray[np.float32]:
    constants = {
        name: value.const_value.numpy() for name, value in model.graph.initializers.items()
    }
    W = constants["w"].reshape(OUT, IN) + update * PAIR.B @ PAIR.A
    y = np.einsum("oi,bi...->bo...", W, x)
    b = constants.get("b", np.zeros(OUT, np.float32))
    return y + b.reshape(OUT, *[1] * (x.ndim - 2))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_the_layer_becomes_a_product_that_takes_an_adapter(kind: str, bias: bool) -> None:
    bias = bias and kind != "MatMul"
    model, x = _model(kind, bias=bias), numbers(BATCH, IN, *SIZES[kind])
    base, adapted = _expected(model, x, 0), _expected(model, x, 2)
    features_last(model.graph, matrices_of([ADAPTER], None))
    np.testing.assert_allclose(run(model, {"x": x}), base, rtol=0, atol=1e-5)
    found = find_linears(model).linears["proj"]
    assert (found.in_features, found.out_features) == (IN, OUT)
    assert (found.bias is not None) == bias
    merge_adapter(model, find_linears(model).linears, ADAPTER)
    np.testing.assert_allclose(run(model, {"x": x}), adapted, rtol=0, atol=1e-5)
    assert np.abs(adapted - base).max() > 0.1, "the adapter did nothing"


@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_without_names_the_checkpoint_shows_that_it_is_a_matrix(kind: str, tmp_path: Path) -> None:
    save_file({"proj.weight": numbers(OUT, IN)}, tmp_path / "model.safetensors")
    model = _model(kind, module=None)
    features_last(model.graph, matrices_of([], tmp_path))
    assert ops(model) == ["Transpose", "MatMul", "Transpose"]


@pytest.mark.parametrize("kind", list(WEIGHTS)[1:])
def test_a_convolution_of_the_checkpoint_is_not_changed(kind: str, tmp_path: Path) -> None:
    stored = {"proj.weight": numbers(OUT, IN, *WEIGHTS[kind]), "other.weight": numbers(OUT, IN)}
    save_file(stored, tmp_path / "model.safetensors")
    model = _model(kind)
    features_last(model.graph, matrices_of([ADAPTER], tmp_path))
    assert ops(model) == ["Conv"]


def test_a_convolution_with_strides_is_not_changed() -> None:
    b = Builder()
    x, w = b.input("x", [BATCH, IN, POSITIONS]), b.weight("w", OUT, IN, 1)
    model = b.model(b.node("Conv", [x, w], None, module="proj", strides=[2]))
    features_last(model.graph, matrices_of([ADAPTER], None))
    assert ops(model) == ["Conv"]


def test_a_product_of_two_constants_is_not_changed() -> None:
    b = Builder()
    turned = b.node("Transpose", [b.weight("w", OUT, IN)], [IN, OUT], perm=[1, 0])
    y = b.node("MatMul", [b.weight("table", OUT, IN), turned], [OUT, OUT], module="proj")
    model = b.model(y)
    features_last(model.graph, matrices_of([ADAPTER], None))
    assert ops(model) == ["Transpose", "MatMul"]
