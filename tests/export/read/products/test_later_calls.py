"""A module that a graph calls twice takes an adapter at both calls, or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.errors import ExportError
from loradeploy.export.match.linears import find_linears
from loradeploy.export.match.operators import MICROSOFT
from loradeploy.export.read.modules.find import Evidence, find_modules
from loradeploy.export.read.products.later_calls import join_later_calls
from tests.export.graphs import IN, Builder, numbers

_MODULE = "block.proj"
_WEIGHT = numbers(IN, IN, seed=5)
_SHAPE: list[int | str] = ["batch", IN]


def _adapter(*modules: str) -> Adapter:
    pair = Factors(np.ones((2, IN), np.float32), np.ones((IN, 2), np.float32))
    targets = tuple(sorted({module.rpartition(".")[2] for module in modules}))
    config = AdapterConfig(r=2, lora_alpha=4, target_modules=targets)
    return Adapter(config, dict.fromkeys(modules, pair))


def _two_products(later: NDArray[np.float32], carrier: str | None = None) -> ir.Model:
    b = Builder()
    x = b.input("x", _SHAPE)
    for name, values in (("proj", _WEIGHT), ("proj_1", later)):
        matrix = b.constant(f"{name}.w", values)
        if carrier is not None:
            matrix = b.node(carrier, [matrix], [IN, IN], perm=[1, 0])
        x = b.node("MatMul", [x, matrix], _SHAPE, name=f"/block/{name}/MatMul")
    return b.model(x)


@pytest.mark.parametrize("carrier", [None, "Transpose"])
def test_copies_of_a_weight_for_each_call_become_one(carrier: str | None) -> None:
    model = _two_products(_WEIGHT.copy(), carrier)
    assert find_linears(model).linears.keys() == {_MODULE, f"{_MODULE}_1"}
    join_later_calls(model.graph)
    linears = find_linears(model).linears
    assert {module: len(linear.nodes) for module, linear in linears.items()} == {_MODULE: 2}


def test_modules_with_other_weights_stay_apart(tmp_path: Path) -> None:
    model = _two_products(numbers(IN, IN, seed=6))
    join_later_calls(model.graph)
    found = find_modules(model, tmp_path, Evidence(), [_adapter(_MODULE)])
    assert found.linears.keys() == {_MODULE, f"{_MODULE}_1"}


def test_a_call_whose_copy_of_the_weight_was_rounded_takes_no_adapters(tmp_path: Path) -> None:
    """onnxruntime's quantizers replace the weight that several products share at one of them."""
    model = _two_products(np.round(_WEIGHT * 8) / 8)
    join_later_calls(model.graph)
    with pytest.raises(ExportError, match=r"block\.proj: block\.proj_1 may be another call of it"):
        find_modules(model, tmp_path, Evidence(), [_adapter(_MODULE)])
    assert not find_modules(model, tmp_path, Evidence(), []).linears
    both = find_modules(model, tmp_path, Evidence(), [_adapter(_MODULE, f"{_MODULE}_1")])
    assert both.linears.keys() == {_MODULE, f"{_MODULE}_1"}, "the adapter has two modules"


def test_a_layer_whose_second_call_is_fused_with_others_takes_no_adapters(tmp_path: Path) -> None:
    """onnxruntime fuses only the second attention of ALBERT's shared layers."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    shape: list[int | str] = ["batch", "sequence", IN]
    y = b.node("MatMul", [x, b.constant("w", _WEIGHT)], shape, name="/block/proj/MatMul")
    other = b.node("MatMul", [y, b.weight("v", IN, IN)], shape, name="/block/other/MatMul")
    parts = [numbers(IN, IN, seed=1), _WEIGHT, numbers(IN, IN, seed=2)]
    packed = b.constant("qkv", np.concatenate(parts, axis=1))
    bias = b.weight("b", 3 * IN)
    fused = b.node("Attention", [other, packed, bias], shape, domain=MICROSOFT, num_heads=1)
    model = b.model(fused)
    assert find_modules(model, tmp_path, Evidence(), []).linears.keys() == {"block.other"}
    with pytest.raises(ExportError, match=r"block\.proj: node_Attention_0 has the same weight"):
        find_modules(model, tmp_path, Evidence(), [_adapter(_MODULE)])
