from __future__ import annotations

import time

import numpy as np
import onnx_ir as ir
import pytest

from loradeploy.export.match.linears import find_linears, output_head
from loradeploy.export.match.products import precision_of
from tests.export.graphs import IN, OUT, Builder, linear


def test_a_product_is_found_by_its_module_path() -> None:
    found = find_linears(linear()).linears["block.proj"]
    assert (found.in_features, found.out_features, found.transposed) == (IN, OUT, False)
    assert found.found_by == "metadata pkg.torch.onnx.name_scopes"
    assert found.weight.name == "w"


def test_a_product_is_found_by_a_node_name_that_spells_a_path() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)], name="/model/layers.0/attn/o_proj/MatMul")
    found = find_linears(b.model(y)).linears["model.layers.0.attn.o_proj"]
    assert found.found_by == "node name"


@pytest.mark.parametrize(
    "name",
    [
        "fused /encoder/layer.0/dense/Gemm",
        "/encoder/layer.0/dense/MatMul/MatMulAddFusion",
        "/encoder/layer.0/dense/MatMul/MatMulScaleFusion/",
        "/encoder/layer.0/dense/MatMul/MatMulAddFusion_quant",
        "fused /encoder/layer.0/dense/MatMul/MatMulAddFusion/GemmTransposeFusion/",
        "fused fused /encoder/layer.0/dense/MatMul",
    ],
)
def test_a_name_changed_by_onnxruntimes_optimizer_spells_the_same_path(name: str) -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)], name=name)
    assert list(find_linears(b.model(y)).linears) == ["encoder.layer.0.dense"]


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("/a/fc/xFusionLinear", ["a.fc"]),
        ("/a/fc/xFusionLinear/MatMul", ["a.fc.xFusionLinear"]),
        ("/" + "Fusion" * 10_000 + "/x", []),
        ("fused " * 10_000 + "/a/fc/MatMul", []),
    ],
    ids=["operator", "module", "long", "fused"],
)
def test_a_path_that_was_not_changed_by_the_optimizer_is_kept(
    name: str, modules: list[str]
) -> None:
    b = Builder()
    y = b.node("MatMul", [b.input("x", ["batch", IN]), b.weight("w", IN, OUT)], name=name)
    begin = time.thread_time()
    assert list(find_linears(b.model(y)).linears) == modules
    assert time.thread_time() - begin < 1, "quadratic in the name's length"


def test_a_linear_without_a_module_is_listed() -> None:
    findings = find_linears(linear(module=None))
    assert findings.linears == {}
    assert findings.unidentified == (f"y [{IN} → {OUT}]",)


@pytest.mark.parametrize("carrier", ["Transpose", "Cast", "Identity"])
def test_a_weight_is_followed_through_nodes_that_pass_it_on(carrier: str) -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    attributes = {"Transpose": {"perm": [1, 0]}, "Cast": {"to": 1}}.get(carrier, {})
    turned = carrier == "Transpose"
    w = b.weight("w", *((OUT, IN) if turned else (IN, OUT)))
    carried = b.node(carrier, [w], [IN, OUT], **attributes)
    y = b.node("MatMul", [x, carried], ["batch", "sequence", OUT], module="m")
    found = find_linears(b.model(y)).linears["m"]
    assert (found.in_features, found.out_features, found.transposed) == (IN, OUT, turned)
    assert found.weight is w


@pytest.mark.parametrize("turned", [0, 1])
def test_a_gemm_is_found_with_its_bias(turned: int) -> None:
    b = Builder()
    x = b.input("x", ["batch", IN])
    w = b.weight("w", *((OUT, IN) if turned else (IN, OUT)))
    bias = b.weight("b", OUT)
    y = b.node("Gemm", [x, w, bias], ["batch", OUT], module="m", transB=turned)
    found = find_linears(b.model(y)).linears["m"]
    assert (found.in_features, found.out_features, found.transposed) == (IN, OUT, bool(turned))
    assert found.bias is bias


def test_a_gemm_with_a_scale_is_not_a_linear() -> None:
    b = Builder()
    x = b.input("x", ["batch", IN])
    y = b.node("Gemm", [x, b.weight("w", IN, OUT)], ["batch", OUT], module="m", alpha=2.0)
    assert find_linears(b.model(y)).linears == {}


def test_the_bias_that_is_added_to_a_product_is_found() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    product = b.node("MatMul", [x, b.weight("w", IN, OUT)], module="m")
    bias = b.weight("b", OUT)
    y = b.node("Add", [bias, product])
    assert find_linears(b.model(y)).linears["m"].bias is bias


def test_products_of_two_activations_are_not_linears() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    w = b.input("w", [IN, OUT])
    y = b.node("MatMul", [x, w], module="m")
    assert find_linears(b.model(y)).linears == {}


def test_a_module_that_is_called_twice_is_one_linear() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    w = b.weight("w", IN, IN)
    once = b.node("MatMul", [x, w], ["batch", "sequence", IN], module="m")
    twice = b.node("MatMul", [once, w], ["batch", "sequence", IN], module="m")
    assert len(find_linears(b.model(twice)).linears["m"].nodes) == 2


@pytest.mark.parametrize("named", ["/block/proj", "/block/proj_1/xFusion", "/block/other_1"])
@pytest.mark.parametrize("carrier", [None, "Transpose"])
def test_the_later_calls_that_torchs_older_exporter_numbers_are_calls_of_the_module(
    carrier: str | None, named: str
) -> None:
    """ALBERT's shared layers, and DeBERTa's projections of positions (share_att_key)."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    w = b.weight("w", IN, IN)

    def product(value: ir.Value, name: str) -> ir.Value:
        matrix = w if carrier is None else b.node(carrier, [w], [IN, IN], perm=[1, 0])
        return b.node("MatMul", [value, matrix], ["batch", "sequence", IN], name=f"{name}/MatMul")

    y = product(product(product(x, "/block/proj"), "/block/proj_1"), "/block/proj_2")
    y = b.node("MatMul", [y, b.weight("v", IN, IN)], name=f"{named}/MatMul")
    linears = find_linears(b.model(y)).linears
    other = named.strip("/").replace("/", ".")
    if named == "/block/proj":
        assert "block.proj" not in linears, "two weights under one name"
        return
    assert len(linears["block.proj"].nodes) == 3
    assert linears.keys() == {"block.proj", other}


def test_two_weights_under_one_module_are_listed_instead() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    once = b.node("MatMul", [x, b.weight("w", IN, IN)], module="m")
    twice = b.node("MatMul", [once, b.weight("v", IN, IN)], module="m")
    findings = find_linears(b.model(twice))
    assert findings.linears == {}
    assert len(findings.unidentified) == 2


def test_packed_weights_are_found_by_their_sizes() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", 32])
    packed = b.constant("w", np.zeros((OUT, 1, 16), np.uint8))
    scales = b.weight("s", OUT)
    y = b.node("MatMulNBits", [x, packed, scales], name="/m/q_proj/MatMul", K=32, N=OUT, bits=4)
    found = find_linears(b.model(y)).linears["m.q_proj"]
    assert (found.in_features, found.out_features, found.quantized) == (32, OUT, True)


@pytest.mark.parametrize(("bits", "precision"), [(2, "int4"), (4, "int4"), (8, "int8")])
def test_packed_weights_map_to_a_precision_of_bundles(bits: int, precision: str) -> None:
    b = Builder()
    x = b.input("x", ["batch", 32])
    packed = b.constant("w", np.zeros((OUT, 2, 2 * bits), np.uint8))
    given = {"K": 32, "N": OUT, "bits": bits, "block_size": 16, "domain": "com.microsoft"}
    y = b.node("MatMulNBits", [x, packed, b.weight("s", 2 * OUT)], ["batch", OUT], **given)
    assert precision_of(b.model(y)) == precision


def test_the_output_head_is_the_product_that_computes_the_logits() -> None:
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    hidden = b.node("MatMul", [x, b.weight("w", IN, IN)], module="body")
    product = b.node("MatMul", [hidden, b.weight("v", IN, OUT)], module="head")
    capped = b.node("Tanh", [b.node("Add", [product, b.weight("b", OUT)])])
    logits = b.node("Identity", [capped], name="logits")
    model = b.model(logits)
    assert output_head(model, find_linears(model)) == "head"


def test_nodes_of_other_domains_are_ignored() -> None:
    model = linear()
    node = next(iter(model.graph))
    foreign = ir.node(
        "MatMul", list(node.inputs), domain="acme", metadata_props=node.metadata_props
    )
    model.graph.append(foreign)
    assert len(find_linears(model).linears["block.proj"].nodes) == 1
