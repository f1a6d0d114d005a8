"""A layer with a scale factor of its own takes no adapters: the factor would scale them too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.errors import ExportError
from loradeploy.export.read.modules.find import Evidence, find_modules
from tests.export.graphs import IN, OUT, Builder

MODULE, SCOPE = "block.0.proj", "/block/0/proj"
ADAPTER = Adapter(
    AdapterConfig(r=2, lora_alpha=4, target_modules=("proj",)),
    {MODULE: Factors(np.ones((2, IN), np.float32), np.ones((OUT, 2), np.float32))},
)


def _scaled(where: str, op: str, scope: str, *, metadata: bool = False) -> ir.Model:
    """x W + b of a module, scaled before the product, after it, or after the bias."""
    b = Builder()

    def scaled(value: ir.Value, size: int) -> ir.Value:
        name = "" if metadata else f"{scope}/{op}"
        module = scope.strip("/").replace("/", ".") if metadata else None
        factor = b.constant("factor", np.full(size, 0.5, np.float32))
        shape = ["batch", value.shape[-1]] if value.shape else None
        return b.node(op, [value, factor], shape, name=name, module=module)

    x = b.input("x", ["batch", IN])
    if where == "before":
        x = scaled(x, IN)
    names = {"module": MODULE} if metadata else {"name": f"{SCOPE}/MatMul"}
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)], ["batch", OUT], **names)
    if where == "behind":
        y = scaled(y, 1)
    y = b.node("Add", [y, b.weight("b", OUT)], ["batch", OUT])
    return b.model(scaled(y, OUT) if where == "behind its bias" else y)


@pytest.mark.parametrize("metadata", [False, True], ids=["names", "metadata"])
@pytest.mark.parametrize("op", ["Mul", "Div"])
@pytest.mark.parametrize("where", ["before", "behind", "behind its bias"])
def test_a_layer_with_its_own_scale_factor_is_refused(
    where: str, op: str, metadata: bool, tmp_path: Path
) -> None:
    model = _scaled(where, op, SCOPE, metadata=metadata)
    found = find_modules(model, tmp_path, Evidence(), [])
    assert not found.linears
    assert len(found.unidentified) == 1
    with pytest.raises(ExportError, match=r"block\.0\.proj: its node .* scales the product"):
        find_modules(model, tmp_path, Evidence(), [ADAPTER])


def test_the_weights_of_the_checkpoint_do_not_explain_the_factor_either(tmp_path: Path) -> None:
    model = _scaled("behind", "Mul", SCOPE)
    weight, bias = (model.graph.initializers[n].const_value.numpy() for n in "wb")
    tensors = {f"{MODULE}.weight": np.ascontiguousarray(weight.T), f"{MODULE}.bias": bias}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match="scales the product"):
        find_modules(model, tmp_path, Evidence(checkpoint=tmp_path), [ADAPTER])


@pytest.mark.parametrize("where", ["before", "behind", "behind its bias"])
def test_a_factor_of_another_module_is_accepted(where: str, tmp_path: Path) -> None:
    for scope in ("/block/0", "/block/0/norm"):
        model = _scaled(where, "Mul", scope)
        assert MODULE in find_modules(model, tmp_path, Evidence(), [ADAPTER]).linears


def _with_tools_factor(where: str, *, name: str = "scaled") -> ir.Model:
    """x W of a module, with a factor whose node has no module's name."""
    b = Builder()
    x = b.input("x", ["batch", IN])
    factor = b.constant("factor", np.float32(2))
    if where == "before":
        x = b.node("Mul", [x, factor], ["batch", IN], name=name)
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)], ["batch", OUT], name=f"{SCOPE}/MatMul")
    if where == "behind a reshape":
        shape = b.constant("shape", np.array([-1, OUT], np.int64))
        y = b.node("Reshape", [y, shape], ["batch", OUT])
    if where != "before":
        y = b.node("Mul", [y, factor], ["batch", OUT], name=name)
    if where == "behind, before the bias":
        y = b.node("Add", [y, b.weight("b", OUT)], ["batch", OUT])
    return b.model(y)


def test_a_factor_without_a_module_name_is_the_layers_if_its_bias_follows(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="its node scaled scales the product"):
        find_modules(_with_tools_factor("behind, before the bias"), tmp_path, Evidence(), [ADAPTER])


@pytest.mark.parametrize("where", ["before", "behind", "behind a reshape"])
def test_only_the_weight_explains_a_factor_without_a_module_name(
    where: str, tmp_path: Path
) -> None:
    """It may be that of an attention on its queries, or a tool's that divided the weight by it."""
    model = _with_tools_factor(where)
    with pytest.raises(ExportError, match="scaled, no node of a module, .*give `checkpoint`"):
        find_modules(model, tmp_path, Evidence(), [ADAPTER])
    model = _with_tools_factor(where)
    (weight,) = (v.const_value.numpy() for n, v in model.graph.initializers.items() if n == "w")
    save_file({f"{MODULE}.weight": np.ascontiguousarray(weight.T)}, tmp_path / "model.safetensors")
    evidence = Evidence(checkpoint=tmp_path)
    assert MODULE in find_modules(model, tmp_path, evidence, [ADAPTER]).linears
    of_model = _with_tools_factor(where, name="/Mul")
    assert MODULE in find_modules(of_model, tmp_path, Evidence(), [ADAPTER]).linears


@pytest.mark.parametrize("norm", ["", "RMSNormalization", "Sqrt", "Reciprocal"])
def test_a_per_feature_scale_before_the_product_is_refused_unless_a_norm_precedes_it(
    norm: str, tmp_path: Path
) -> None:
    """The nodes of norms have their own module names."""
    b = Builder()
    x = b.input("x", ["batch", IN])
    if norm == "RMSNormalization":
        x = b.node(norm, [x, b.constant("ones", np.ones(IN, np.float32))], ["batch", IN])
    elif norm:
        size = b.node("ReduceMean", [b.node("Mul", [x, x])])
        divided = b.node(norm, [size])
        x = b.node("Div" if norm == "Sqrt" else "Mul", [x, divided], ["batch", IN])
    scale = b.constant("scale", np.linspace(0.5, 2, IN).astype(np.float32))
    x = b.node("Mul", [scale, x], ["batch", IN], name="smooth")
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)], ["batch", OUT], name=f"{SCOPE}/MatMul")
    model = b.model(y)
    if norm:
        assert MODULE in find_modules(model, tmp_path, Evidence(), [ADAPTER]).linears
        return
    with pytest.raises(ExportError, match="its node smooth scales the product"):
        find_modules(model, tmp_path, Evidence(), [ADAPTER])


def test_the_logit_scales_of_the_genai_builder_are_accepted(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", ["batch", IN])
    q = b.node(
        "GroupQueryAttention", [x], ["batch", IN], name="/model/layers.0/attn/GroupQueryAttention"
    )
    y = b.node("MatMul", [q, b.weight("w", IN, OUT)], ["batch", OUT], name="/lm_head/MatMul")
    factor = b.constant("factor", np.float32(0.1))
    model = b.model(b.node("Mul", [y, factor], ["batch", OUT], name="/lm_head/Mul"))
    assert "lm_head" in find_modules(model, tmp_path, Evidence(), []).linears
