"""Products of the same input are fused into one, compute the same, and can be split again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import ExportError
from loradeploy.export.api import export
from loradeploy.export.graph.file import load_graph
from loradeploy.export.match.linears import Linear, find_linears
from loradeploy.export.passes.forms.branches import add_branches, remove_branches
from loradeploy.export.passes.forms.layout import use_row_layout
from loradeploy.export.passes.fuse import fuse_products
from loradeploy.export.passes.side_inputs.inject import inject_side_inputs, remove_side_inputs
from tests.conftest import MakeAdapter
from tests.export.graphs import IN, Builder, manifest_of, numbers, ops, run
from tests.export.reference import difference, onnx_output
from tests.tolerances import tolerance

IDS = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
PARTS = ("attn.q", "attn.k", "attn.v", "cross.v")


def attention(*, tied: bool = False, other_parent: bool = False, turned: bool = False) -> ir.Model:
    """q, k and v of one input, concatenated in the output; v has a bias."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    outputs = []
    for name, size in (("q", 4), ("k", 2), ("v", 2)):
        parent = "cross" if other_parent and name == "v" else "attn"
        w = b.weight(f"{name}.weight", *((size, IN) if turned else (IN, size)))
        if turned:
            w = b.node("Transpose", [w], [IN, size], perm=[1, 0], name=f"{name}.turned")
        shape: list[int | str] = ["batch", "sequence", size]
        y = b.node("MatMul", [x, w], shape, module=f"{parent}.{name}", name=f"{name}.y")
        if name == "v":
            y = b.node("Add", [y, b.weight("v.bias", size)], shape, name="v.biased")
        outputs.append(y)
        if tied and name == "k":
            outputs.append(b.node("MatMul", [y, b.node("Transpose", [w], [2, IN])], None))
    whole = b.node("Concat", outputs, ["batch", "sequence", None], name="y", axis=-1)  # type: ignore[list-item]
    return b.model(whole)


def test_products_of_one_input_are_fused_and_compute_the_same() -> None:
    x, before = numbers(2, 3, IN), attention()
    model = attention()
    (fused,) = fuse_products(model.graph, find_linears(model).linears.values())
    assert fused.label == "attn.q+k+v"
    assert [member.slice for member in fused.members] == [(0, 4), (4, 6), (6, 8)]
    assert ops(model) == ["MatMul", "Split", "Add", "Concat"]
    np.testing.assert_allclose(run(model, {"x": x}), run(before, {"x": x}), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "products"),
    [
        ({"tied": True}, ["attn.q+v", "attn.k"]),
        ({"other_parent": True}, ["attn.q+k", "cross.v"]),
        ({"turned": True}, ["attn.q", "attn.k", "attn.v"]),
    ],
    ids=["a weight with other users", "another module's", "turned weights"],
)
def test_products_that_cannot_be_fused_are_not_changed(
    options: dict[str, bool], products: list[str]
) -> None:
    x, model = numbers(2, 3, IN), attention(**options)
    found = find_linears(model).linears
    fused = fuse_products(model.graph, (m for m in found.values() if m.module in PARTS))
    assert sorted(product.label for product in fused) == sorted(products)
    expected = run(attention(**options), {"x": x})
    np.testing.assert_allclose(run(model, {"x": x}), expected, atol=1e-6)


def test_side_inputs_of_a_fused_product_can_be_removed() -> None:
    base, model = attention(), attention()
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    assert [target.slice for target in added.targets] == [(0, 4), (4, 6), (6, 8)]
    names = [f"attn.{member}.lora_{factor}" for member in "qkv" for factor in "AB"]
    assert [value.name for value in model.graph.inputs[2:]] == names
    remove_side_inputs(model, manifest_of(added))
    assert [v.name for v in model.graph.inputs] == ["x"]
    before, after = find_linears(base).linears, find_linears(model).linears
    assert before.keys() == after.keys()
    for module, linear in after.items():
        np.testing.assert_array_equal(
            linear.weight.const_value.numpy(), before[module].weight.const_value.numpy()
        )
        assert (linear.bias is None) == (before[module].bias is None)
    x = numbers(2, 3, IN)
    assert np.array_equal(run(model, {"x": x}), run(base, {"x": x}))


BITS = {"q": 4, "k": 4, "v": 4}


def in_few_bits(
    *, zeros: str = "", bias: str = "", flat: str = "", bits: dict[str, int] = BITS
) -> ir.Model:
    """q, k and v of one input as MatMulNBits, [batch, sequence, 14 in all]; 96 inputs are 3 blocks.

    `zeros`, `bias`, `flat`: the names of those with zero points, with a bias, with flat scales.
    """
    random = np.random.default_rng(3)
    b = Builder()
    x, blocks = b.input("x", ["batch", "sequence", 96]), 3
    outputs = []
    for name, out in (("q", 8), ("k", 4), ("v", 2)):
        integers = random.integers(0, 256, (out, blocks, 4 * bits[name]), np.uint8)
        scales = random.random((out, blocks)).astype(np.float32)
        constants = {
            "weight": integers,
            "scales": scales.reshape(-1) if name in flat else scales,
            "zeros": random.integers(0, 256, (out, -(-blocks * bits[name] // 8)), np.uint8),
            "groups": None,
            "bias": numbers(out),
        }
        count = 5 if name in bias else 3 if name in zeros else 2
        if name not in zeros:
            constants["zeros"] = None
        inputs = [
            None if values is None else b.constant(f"{name}.{part}", values)
            for part, values in list(constants.items())[:count]
        ]
        y = b.node(
            *("MatMulNBits", [x, *inputs], ["batch", "sequence", out]),  # type: ignore[list-item]
            domain="com.microsoft",
            module=f"attn.{name}",
            name=name,
            K=96,
            N=out,
            bits=bits[name],
            block_size=32,
            accuracy_level=4,
        )
        outputs.append(y)
    model = b.model(b.node("Concat", outputs, ["batch", "sequence", 14], name="y", axis=-1))
    model.opset_imports["com.microsoft"] = 1
    return model


@pytest.mark.parametrize("form", [{}, {"zeros": "qkv"}, {"flat": "qkv"}], ids=str)
def test_products_in_few_bits_are_fused_and_can_be_separated_again(form: dict[str, Any]) -> None:
    base, model, x = in_few_bits(**form), in_few_bits(**form), numbers(2, 3, 96)
    before = {module: one.nodes[0] for module, one in find_linears(base).linears.items()}
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    assert ops(model)[:2] == ["MatMulNBits", "Split"]
    assert ops(model).count("MatMulNBits") == 1
    names = [value.name for value in next(iter(model.graph)).inputs]
    assert names[1:3] == ["attn.q+k+v.weight.int4", "attn.q+k+v.weight.int4.scales"]
    assert [target.slice for target in added.targets] == [(0, 8), (8, 12), (12, 14)]
    assert all(target.transposed for target in added.targets)
    expected = run(base, {"x": x})
    np.testing.assert_array_equal(run(model, {"x": x}), expected)
    update = {"attn.k.lora_A": numbers(1, 96, 2), "attn.k.lora_B": numbers(1, 2, 4)}
    changed = np.abs(run(model, {"x": x, **update}) - expected).max(axis=(0, 1)) > 0.1
    assert changed.tolist() == [False] * 8 + [True] * 4 + [False] * 2
    remove_side_inputs(model, manifest_of(added))
    np.testing.assert_array_equal(run(model, {"x": x}), expected)
    for module, linear in find_linears(model).linears.items():
        for own, value in zip(linear.nodes[0].inputs[1:], before[module].inputs[1:], strict=True):
            assert own is not None and value is not None
            np.testing.assert_array_equal(own.const_value.numpy(), value.const_value.numpy())


@pytest.mark.parametrize(
    ("form", "products"),
    [
        ({"bits": {"q": 4, "k": 8, "v": 4}}, ["attn.k", "attn.q+v"]),
        ({"zeros": "k"}, ["attn.k", "attn.q+v"]),
        ({"flat": "v"}, ["attn.q+k", "attn.v"]),
        ({"bias": "q"}, ["attn.k+v", "attn.q"]),
    ],
    ids=["other bits", "zero points", "another shape of scales", "a bias of its own"],
)
def test_products_in_few_bits_of_other_forms_are_not_fused(
    form: dict[str, Any], products: list[str]
) -> None:
    base, model, x = in_few_bits(**form), in_few_bits(**form), numbers(2, 3, 96)
    fused = fuse_products(model.graph, find_linears(model).linears.values())
    assert sorted(product.label for product in fused) == products
    np.testing.assert_array_equal(run(model, {"x": x}), run(base, {"x": x}))


def packed() -> tuple[ir.Model, list[Linear]]:
    """q, k and v as one product whose output is never split."""
    b = Builder()
    x, w = b.input("x", ["batch", "sequence", IN]), b.weight("qkv.weight", IN, 8)
    y = b.node("MatMul", [x, w], ["batch", "sequence", 8], module="attn.qkv", name="y")
    model = b.model(y)
    (whole,) = find_linears(model).linears.values()
    slices = {"q": (0, 4), "k": (4, 6), "v": (6, 8)}
    members = [
        dataclasses.replace(whole, module=f"attn.{name}", slice=own, out_features=own[1] - own[0])
        for name, own in slices.items()
    ]
    return model, members


def test_members_of_a_packed_product_have_separate_side_inputs() -> None:
    model, members = packed()
    base, x = packed()[0], numbers(2, 3, IN)
    added = inject_side_inputs(model, members)
    assert "Split" not in ops(model)
    A, B = numbers(1, IN, 2), numbers(1, 2, 2)
    feeds = {"x": x, "attn.k.lora_A": A, "attn.k.lora_B": B}
    update = np.zeros((2, 3, 8), np.float32)
    update[..., 4:6] = x @ A[0] @ B[0]
    expected = run(base, {"x": x}) + update
    np.testing.assert_allclose(run(model, feeds), expected, rtol=1e-5, atol=1e-5)
    remove_side_inputs(model, manifest_of(added))
    assert ops(model) == ["MatMul"]


def two_members(kind: str, rows: str) -> tuple[ir.Model, list[Linear]]:
    """q [.., 4] and k [.., 2] concatenated: of two products, of one, or of one that runs twice."""
    b = Builder()
    batch: list[int | str] = ["batch"] if rows == "no sequence" else ["batch", "sequence"]
    x = h = b.input("x", [*batch, IN])
    if rows == "flattened":
        batch = ["rows"]
        h = b.node("Reshape", [x, b.constant("s", np.array([-1, IN]))], ["rows", IN])
    if kind == "fused":
        q = b.node("MatMul", [h, b.weight("q", IN, 4)], [*batch, 4], module="m.q")
        k = b.node("MatMul", [h, b.weight("k", IN, 2)], [*batch, 2], module="m.k")
        model = b.model(b.node("Concat", [q, k], [*batch, 6], axis=-1))
        return model, list(find_linears(model).linears.values())
    w = b.weight("qk", IN, 6)
    y = b.node("MatMul", [h, w], [*batch, 6], module="m.qk", name="y")
    if kind == "packed, twice":
        again = b.node("Tanh", [h], [*batch, IN])
        z = b.node("MatMul", [again, w], [*batch, 6], module="m.qk", name="z")
        y = b.node("Add", [y, z], [*batch, 6])
    model = b.model(y)
    (whole,) = find_linears(model).linears.values()
    return model, [
        dataclasses.replace(whole, module="m.q", slice=(0, 4), out_features=4),
        dataclasses.replace(whole, module="m.k", slice=(4, 6), out_features=2),
    ]


@pytest.mark.parametrize("branches", [False, True], ids=["slots", "branches"])
@pytest.mark.parametrize("rows", ["a sequence", "no sequence", "flattened"])
@pytest.mark.parametrize("kind", ["fused", "packed", "packed, twice"])
def test_members_add_their_updates_per_row(kind: str, rows: str, branches: bool) -> None:
    base, (model, members) = two_members(kind, rows)[0], two_members(kind, rows)
    x = numbers(2, IN) if rows == "no sequence" else numbers(2, 3, IN)
    expected = run(base, {"x": x})
    added = inject_side_inputs(model, members)
    side = {
        "m.q.lora_A": numbers(2, IN, 2, seed=1),
        "m.q.lora_B": numbers(2, 2, 4, seed=2),
        "m.k.lora_A": numbers(2, IN, 1, seed=3),
        "m.k.lora_B": numbers(2, 1, 2, seed=4),
    }

    def update(h: NDArray[Any]) -> NDArray[Any]:
        h = h.reshape(2, -1, IN)
        parts = [h @ side[f"m.{m}.lora_A"] @ side[f"m.{m}.lora_B"] for m in "qk"]
        return np.concatenate(parts, axis=-1).reshape(expected.shape)

    adapted = expected + update(x)
    if kind == "packed, twice":
        adapted += update(np.tanh(x))
    chosen = {"adapter_mode": np.array([1])} if branches else {"adapter_ids": np.array([0, 1])}
    if branches:
        use_row_layout(model.graph)
        add_branches(model.graph)
    np.testing.assert_allclose(run(model, {"x": x, **side, **chosen}), adapted, atol=2e-5)
    np.testing.assert_array_equal(run(model, {"x": x}), expected)
    if branches:
        remove_branches(model.graph)
    remove_side_inputs(model, manifest_of(added))
    assert ops(model) == ops(base)
    np.testing.assert_array_equal(run(model, {"x": x}), expected)


@pytest.mark.parametrize("left_out", range(3))
def test_a_packed_product_takes_adapters_in_all_of_its_parts_or_in_none(left_out: int) -> None:
    model, members = packed()
    del members[left_out]
    with pytest.raises(ExportError, match=r"part of a fused product.* merge the adapter instead"):
        inject_side_inputs(model, members)


@pytest.mark.parametrize("lost", ["product", "split"])
def test_a_graph_that_lost_its_fused_product_is_refused(lost: str) -> None:
    model = attention()
    added = inject_side_inputs(model, list(find_linears(model).linears.values()))
    split = next(node for node in model.graph if node.op_type == "Split")
    if lost == "product":
        split.replace_input_with(0, model.graph.inputs[0])
    else:
        split.name = "another"
    with pytest.raises(ExportError, match=r"attn.q\+k\+v.* it was changed"):
        remove_side_inputs(model, manifest_of(added))


@pytest.mark.parametrize("merge", [False, True], ids=["side inputs", "merged"])
def test_a_decoder_has_four_products_per_layer(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path, merge: bool
) -> None:
    export(tiny_llama, tmp_path / "b", adapters={"a": make_adapter(tiny_llama)}, merge=merge)
    linears = find_linears(load_graph(tmp_path / "b" / "model.onnx")).linears
    layer = sorted(m.rpartition(".")[2] for m in linears if ".layers.0." in m)
    assert layer == ["down_proj", "gate_proj+up_proj", "o_proj", "q_proj+k_proj+v_proj"]


def test_side_inputs_can_be_added_to_a_merged_graph_and_removed(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, target_modules=["q_proj", "v_proj", "o_proj"])
    export(tiny_llama, tmp_path / "m", adapters={"a": adapter}, merge=True)
    scope = "model.layers.(\\d+).self_attn."
    sizes = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    modules = [[f"model.layers.\\1.self_attn.{name}", size] for name, size in sizes.items()]
    rules = {rf"{scope}q_proj\+k_proj\+v_proj/MatMul": modules}
    (tmp_path / "map.json").write_text(json.dumps(rules))
    given = {"module_map": tmp_path / "map.json", "adapters": {"a": adapter}}
    manifest = export(tmp_path / "m" / "model.onnx", tmp_path / "b", **given)
    assert {"model.layers.1.self_attn.k_proj"} <= {target.module for target in manifest.targets}
    merged = onnx_output(tmp_path / "m", IDS)
    assert difference(onnx_output(tmp_path / "b", IDS), merged) <= tolerance("rows")
    again = export(tmp_path / "b", tmp_path / "again", layout="rows")
    assert [t.module for t in again.targets] == [t.module for t in manifest.targets]
    assert difference(onnx_output(tmp_path / "again", IDS), merged) <= tolerance("rows")


def test_a_packed_bundle_is_split_without_loss(tiny_llama_bundle: Path, tmp_path: Path) -> None:
    export(tiny_llama_bundle, tmp_path / "packed", precision="int4")
    export(tmp_path / "packed", tmp_path / "again", side_inputs=["dora"])
    targets = read_manifest(tmp_path / "again").targets
    assert all(target.slice is None for target in targets)  # each has its own scales
    again = onnx_output(tmp_path / "again", IDS)
    assert difference(onnx_output(tmp_path / "packed", IDS), again) <= tolerance("rows")
