"""bf16 bundles: weights are stored as bfloat16, computation is in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import loradeploy as ld
from loradeploy.export.api import export
from loradeploy.export.graph.file import load_graph
from loradeploy.export.match.linears import find_linears
from loradeploy.export.match.modules.weights import to_bfloat16
from loradeploy.export.passes.precision.bf16 import compute_as_float32, store_as_bfloat16
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter, once
from tests.export.graphs import IN, OUT, Builder, numbers, ops, run
from tests.export.reference import difference, torch_output
from tests.runtime.feeds import logits, random_ids
from tests.tolerances import tolerance

IDS = random_ids(3, 7)


def two_products() -> ir.Model:
    """Return the graph of T (x W + b); the table T is not a weight (as in rotary embeddings)."""
    b = Builder()
    x = b.input("x", ["batch", 3, IN])
    turned = b.node("Transpose", [b.weight("W", OUT, IN)], [IN, OUT], perm=[1, 0])
    y = b.node("MatMul", [x, turned], ["batch", 3, OUT])
    y = b.node("Add", [y, b.weight("bias", OUT)], ["batch", 3, OUT])
    return b.model(b.node("MatMul", [b.weight("table", 3, 3), y], ["batch", 3, OUT], name="y"))


def test_weights_are_stored_in_16_bits_and_other_constants_are_not_changed() -> None:
    model, x = two_products(), numbers(2, 3, IN)
    exact = model.graph.initializers["W"].const_value.numpy()
    before = run(model, {"x": x})
    store_as_bfloat16(model.graph)
    held = {name: value.dtype for name, value in model.graph.initializers.items()}
    float32 = ir.DataType.FLOAT
    assert held == {"W": ir.DataType.BFLOAT16, "bias": float32, "table": float32}
    assert ops(model) == ["Cast", "Transpose", "MatMul", "Add", "MatMul"]
    after = run(model, {"x": x})
    assert 1e-4 < difference(after, before) < 0.1
    compute_as_float32(model.graph)
    assert ops(model) == ["Transpose", "MatMul", "Add", "MatMul"]
    rounded = model.graph.initializers["W"].const_value.numpy()
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, to_bfloat16(exact).astype(np.float32))
    np.testing.assert_array_equal(run(model, {"x": x}), after)


@pytest.fixture(scope="module")
def published(shared: Path, tiny_llama: Path) -> Path:
    """The tiny Llama with weights that bfloat16 represents exactly, like published checkpoints."""

    def make(place: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        model.bfloat16().float().save_pretrained(place)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(place)

    return once(shared / "tiny-llama-published", make)


def test_a_bfloat16_checkpoint_is_exported_exactly_at_half_the_size(
    published: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapters = {"a": make_adapter(published, r=4, seed=1, scale=0.1)}
    export(published, tmp_path / "whole", adapters=adapters)
    manifest = export(tmp_path / "whole", tmp_path / "half", adapters=adapters, precision="bf16")
    assert (manifest.precision, manifest.factor_dtype) == ("bf16", "float32")
    whole, half = AdapterSession(tmp_path / "whole"), AdapterSession(tmp_path / "half")
    for adapter in (None, "a", ["a", None, "a"]):
        np.testing.assert_array_equal(logits(half, IDS, adapter), logits(whole, IDS, adapter))
    adapted = logits(half, IDS, "a")
    expected = torch_output(published, IDS, adapter=adapters["a"])
    assert difference(adapted, expected) < tolerance("torch-onnx-tiny")
    assert difference(adapted, logits(half, IDS)) > 0.1, "the adapter did nothing"
    sizes = [(tmp_path / b / "model.onnx.data").stat().st_size for b in ("half", "whole")]
    assert sizes[0] < 0.55 * sizes[1]


@pytest.mark.parametrize("layout", ["slots", "rows"])
def test_a_bfloat16_bundle_exported_again_is_still_bfloat16(
    layout: str,
    tiny_llama_bundle: Path,
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    adapters = {"a": make_adapter(tiny_llama, r=4, seed=1, scale=0.1)}
    first, again = tmp_path / "first", tmp_path / "again"
    export(tiny_llama_bundle, first, precision="bf16", layout=layout, branches=True)
    manifest = export(first, again, adapters=adapters, layout="slots", branches=False)
    assert manifest.precision == "bf16"
    export(tiny_llama_bundle, tmp_path / "once", precision="bf16", adapters=adapters)
    np.testing.assert_array_equal(
        logits(AdapterSession(again), IDS, "a"), logits(AdapterSession(tmp_path / "once"), IDS, "a")
    )
    np.testing.assert_array_equal(
        logits(AdapterSession(first), IDS), logits(AdapterSession(again), IDS)
    )


def test_a_merge_rounds_once_and_reports_the_error(
    tiny_llama_bundle: Path, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama)
    export(tiny_llama_bundle, tmp_path / "whole", adapters=[adapter], merge=True)
    manifest = export(
        tiny_llama_bundle, tmp_path / "half", adapters=[adapter], merge=True, precision="bf16"
    )
    whole = find_linears(load_graph(tmp_path / "whole" / "model.onnx")).linears
    half = find_linears(load_graph(tmp_path / "half" / "model.onnx")).linears
    assert whole.keys() == half.keys()
    for module, linear in whole.items():
        exact = linear.weight.const_value.numpy()
        np.testing.assert_array_equal(to_bfloat16(exact), half[module].weight.const_value.numpy())
    assert manifest.merge_error is not None
    assert 1e-3 < manifest.merge_error.noise < 0.2


def test_a_dora_adapter_loaded_later_uses_the_rounded_weights(
    published: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(published, r=4, seed=1, scale=0.1, use_dora=True)
    manifest = export(published, tmp_path / "b", precision="bf16", side_inputs=["dora"])
    assert {t.stored.dtype for t in manifest.targets if t.stored} == {"bfloat16"}
    session = AdapterSession(tmp_path / "b")
    session.load("late", adapter)
    adapted = logits(session, IDS, "late")
    expected = torch_output(published, IDS, adapter=adapter)
    assert difference(adapted, expected) < tolerance("torch-onnx-tiny")
    assert difference(adapted, logits(session, IDS)) > 0.1, "the adapter did nothing"


def test_a_graph_of_bfloat16_is_read_without_its_manifest(
    tiny_llama_bundle: Path, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama)
    merged = tmp_path / "merged"
    export(tiny_llama_bundle, merged, adapters=[adapter], merge=True, precision="bf16")
    expected = logits(AdapterSession(merged), IDS)
    (merged / "loradeploy.json").unlink()
    assert export(merged, tmp_path / "b").precision == "bf16"
    np.testing.assert_array_equal(logits(AdapterSession(tmp_path / "b"), IDS), expected)


@pytest.mark.parametrize("asked", [None, "bf16"])
def test_float32_weights_beside_bfloat16_ones_are_rounded_only_on_request(
    asked: str | None, tmp_path: Path
) -> None:
    """Some tools store products in bfloat16 and the embedding in float32."""
    b = Builder()
    ids = b.input("input_ids", ["batch", "sequence"], ir.DataType.INT64)
    words, shape = b.weight("words", 50, IN), ["batch", "sequence", IN]
    x = b.node("Gather", [words, ids], shape)
    w = b.constant("w", to_bfloat16(numbers(IN, OUT)))
    cast = b.node("Cast", [w], [IN, OUT], to=int(ir.DataType.FLOAT))
    given = {"name": "last_hidden_state", "module": "block.proj"}
    model = b.model(b.node("MatMul", [x, cast], ["batch", "sequence", OUT], **given))
    ir.save(model, tmp_path / "model.onnx")
    manifest = export(
        tmp_path / "model.onnx", tmp_path / "b", task="feature-extraction", precision=asked
    )
    assert manifest.precision == (asked or "fp32")
    feeds = {"input_ids": random_ids(2, 5) % 50}
    (found,) = AdapterSession(tmp_path / "b").run(["last_hidden_state"], feeds)
    kept = difference(found, run(model, feeds)) <= tolerance("torch-onnx-tiny")
    assert kept == (asked is None)


def test_parity_passes(published: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(published, r=4, seed=1, scale=0.1)
    export(published, tmp_path / "b", precision="bf16", adapters={"a": adapter})
    report = ld.parity(tmp_path / "b", model=published, prompts=["The capital of", "Hi"], tokens=2)
    assert report.passed, report.failures
