"""A graph that already contains an adapter is refused as a base, detected with or without names."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from loradeploy.errors import ExportError
from loradeploy.export.match.adapter_layers import refuse_adapter_layers, refuse_adapter_products
from tests.export.graphs import IN, OUT, Builder, linear

RANK = 2


@pytest.mark.parametrize(
    "module",
    [
        "base_model.model.model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.q_proj.base_layer",
        "model.layers.0.self_attn.q_proj.lora_A.default",
    ],
)
@pytest.mark.parametrize("detected_by", ["scopes", "node", "weight", "input"])
def test_a_graph_that_contains_an_adapter_is_refused_as_a_base(
    module: str, detected_by: str
) -> None:
    model = linear(module if detected_by == "scopes" else None)
    if detected_by == "node":
        next(iter(model.graph)).name = f"/{module.replace('.', '/')}/MatMul"
    elif detected_by == "weight":
        model.graph.initializers["w"].name = f"{module}.weight"
    elif detected_by == "input":
        model.graph.inputs[0].name = f"{module}.weight"
    with pytest.raises(ExportError, match="contains an adapter as separate layers") as raised:
        refuse_adapter_layers(model)
    assert len(str(raised.value)) <= 300


def test_a_graph_without_an_adapter_is_accepted_as_a_base() -> None:
    refuse_adapter_layers(linear("model.layers.0.self_attn.q_proj"))


def _beside(
    rank: int = RANK, *, scaled: bool = True, bias: bool = False, bent: bool = False
) -> ir.Model:
    """x W (+ b) + s (x A) B, without a name; `bent`: with an activation between A and B."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)])
    if bias:
        y = b.node("Add", [b.weight("b", OUT), y])
    low = b.node("MatMul", [b.node("Identity", [x]), b.weight("p", IN, rank)])
    if bent:
        low = b.node("Relu", [low])
    update = b.node("MatMul", [low, b.weight("q", rank, OUT)])
    if scaled:
        update = b.node("Mul", [update, b.weight("s", 1)])
    return b.model(b.node("Add", [y, update]))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_an_adapter_without_names_is_detected_by_its_matrix_products(
    scaled: bool, bias: bool
) -> None:
    model = _beside(scaled=scaled, bias=bias)
    refuse_adapter_layers(model)  # not detectable by name
    with pytest.raises(ExportError, match=r"contains an adapter of rank 2 beside .* \[6 → 4\]"):
        refuse_adapter_products(model.graph)


@pytest.mark.parametrize("model", [_beside(OUT), _beside(bent=True), linear()])
def test_other_sums_of_products_are_not_taken_for_an_adapter(model: ir.Model) -> None:
    refuse_adapter_products(model.graph)
