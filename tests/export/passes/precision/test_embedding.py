"""`--quantize-embedding`: the token embedding of a quantized graph in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

import loradeploy as ld
from loradeploy.bundle.manifest import read_manifest
from loradeploy.export.passes.precision.embedding import packed_embedding, quantize_embedding
from loradeploy.export.passes.precision.quantize import rounded
from loradeploy.export.passes.side_inputs.inject import SideInputs
from loradeploy.parity.reference.quantized import dequantize_into, quantized_weights
from tests.conftest import MakeAdapter
from tests.export.graphs import Builder, manifest_of, run
from tests.export.reference import onnx_output
from tests.parity.reference.test_tied_rows import make_base

EMPTY = SideInputs((), (), {}, "float32")
TOKENS = 50
IDS = np.array([[0, 7, TOKENS - 1], [3, 3, 20]])


def lookup(size: int, kind: Any = np.float32) -> tuple[ir.Model, NDArray[Any]]:
    """Return a graph that looks up `input_ids` [batch, 3], and its table [TOKENS, size]."""
    b = Builder()
    table = np.random.default_rng(0).standard_normal((TOKENS, size)).astype(kind)
    weight = b.constant("table", table)
    ids = b.input("input_ids", ["batch", 3], ir.DataType.INT64)
    y = b.node("Gather", [weight, ids], ["batch", 3, size], module="embed", name="y", axis=0)
    return b.model(y), table


@pytest.mark.parametrize("size", [64, 40], ids=["whole blocks", "a padded block"])
def test_a_lookup_gives_the_rounded_rows(size: int) -> None:
    model, table = lookup(size)
    manifest = quantize_embedding(model, manifest_of(EMPTY))
    assert manifest.quantized_embedding == "embed"
    actual, expected = run(model, {"input_ids": IDS}), rounded(table, 8)[IDS]
    np.testing.assert_array_equal(actual, expected)
    assert np.abs(actual - table[IDS]).max() > 0, "nothing was rounded"
    packed = packed_embedding(model, "embed")
    assert packed is not None and packed.block == 32
    np.testing.assert_array_equal(packed.values, rounded(table, 8))


def test_the_float_table_is_no_longer_in_the_graph() -> None:
    model, table = lookup(64)
    quantize_embedding(model, manifest_of(EMPTY))
    sizes = [value.const_value.nbytes for value in model.graph.initializers.values()]
    assert sum(sizes) < table.nbytes / 3


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose head is tied to its embedding."""
    return make_base(tmp_path_factory.mktemp("tied") / "base")


@pytest.fixture(scope="module")
def packed(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the tiny Llama in int8, with its embedding."""
    bundle = tmp_path_factory.mktemp("packed") / "b"
    ld.export(tied, bundle, precision="int8", quantize_embedding=True)
    return bundle


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_parity_proves_the_graph_with_adapters_and_controls(
    precision: str, tied: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tied, scale=0.1)
    options: dict[str, Any] = {"adapters": {"a": adapter}, "precision": precision}
    ld.export(tied, tmp_path / "b", **options, quantize_embedding=True)
    report = ld.parity(tmp_path / "b", model=tied, tokens=3, controls=True, certificate=False)
    assert report.passed, report.failures
    assert report.adapters[0].effect > 0.1, "the adapter did nothing"
    assert report.controls and all(control.caught for control in report.controls)


def test_parity_proves_a_merge_of_an_adapter_that_changes_the_embedding(
    tied: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tied, scale=0.1, target_modules=["embed_tokens", "q_proj"])
    options: dict[str, Any] = {"merge": True, "precision": "int8", "quantize_embedding": True}
    ld.export(tied, tmp_path / "b", adapters={"a": adapter}, **options)
    report = ld.parity(
        tmp_path / "b", model=tied, adapters={"a": adapter}, tokens=3, certificate=False
    )
    assert report.passed, report.failures
    assert report.adapters[0].effect > 0.1, "the adapter did nothing"


def test_parity_refuses_an_embedding_that_is_not_the_bases(tied: Path, packed: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    manifest = read_manifest(packed)
    weights = quantized_weights(packed, manifest)
    model = LlamaForCausalLM.from_pretrained(tied)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.model.embed_tokens.weight[5] *= -1
    with pytest.raises(ld.BundleError, match=r"quantized weight of model\.embed_tokens is not"):
        dequantize_into(model, weights, manifest)


def stored(bundle: Path) -> set[str]:
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    return {tensor.name for tensor in graph.initializer}


def test_a_tied_head_and_the_embedding_are_stored_once(
    tied: Path, packed: Path, tmp_path: Path
) -> None:
    ld.export(tied, tmp_path / "float", precision="int8")
    tables = {
        name: {tensor for tensor in stored(bundle) if "embed_" in tensor or "head" in tensor}
        for name, bundle in (("float", tmp_path / "float"), ("packed", packed))
    }
    head = {"lm_head.weight.int8", "lm_head.weight.int8.scales"}
    assert tables["float"] == {"model.embed_tokens.weight", *head}
    small = {f"model.embed_tokens.weight.{name}" for name in ("zero", "shape", "last_axis")}
    assert tables["packed"] == {*small, *head}


def test_a_token_outside_of_the_vocabulary_is_an_error_in_onnxruntime(packed: Path) -> None:
    assert np.isfinite(onnx_output(packed, np.array([[1, 63]]))).all()
    with pytest.raises(InvalidArgument, match="out of data bounds"):
        onnx_output(packed, np.array([[1, 64]]))


def test_an_int4_bundle_is_exported_again_with_a_smaller_embedding_which_it_keeps(
    tied: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    ld.export(tied, tmp_path / "first", precision="int4")
    again = ld.export(tmp_path / "first", tmp_path / "second", quantize_embedding=True)
    assert again.quantized_embedding == "model.embed_tokens"
    adapter = make_adapter(tied, scale=0.1)
    kept = ld.export(tmp_path / "second", tmp_path / "third", adapters={"a": adapter})
    assert kept.quantized_embedding == "model.embed_tokens"
    report = ld.parity(tmp_path / "third", model=tied, tokens=3, certificate=False)
    assert report.passed, report.failures


@pytest.mark.parametrize("merge", [False, True], ids=["side inputs", "merged"])
@pytest.mark.parametrize(
    "changed",
    [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [7, 8]}],
    ids=["lora on the embedding", "trained tokens"],
)
def test_adapters_that_change_the_embedding_are_refused_by_name(
    changed: dict[str, Any],
    merge: bool,
    tied: Path,
    packed: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    adapter = make_adapter(tied, scale=0.1, **changed)
    options: dict[str, Any] = {"adapters": {"a": adapter}}
    if not merge:
        with pytest.raises(ld.ExportError, match=r"embed_tokens .*`quantize_embedding`"):
            ld.export(tied, tmp_path / "x", precision="int8", quantize_embedding=True, **options)
    with pytest.raises(ld.LoraDeployError, match="embed_tokens"):
        ld.export(packed, tmp_path / "y", merge=merge, requantize=merge, **options)


@pytest.mark.parametrize("kind", ["embedding", "tokens"])
def test_side_inputs_of_the_embedding_are_refused_for_a_bundle_that_has_it_quantized(
    kind: str, packed: Path, tmp_path: Path
) -> None:
    with pytest.raises(ld.UsageError, match=rf"{kind}.*model\.embed_tokens of the bundle is quan"):
        ld.export(packed, tmp_path / "x", side_inputs=[kind])


def test_encoder_decoders_and_graphs_of_floats_are_refused(
    tiny_t5: Path, tied: Path, tmp_path: Path
) -> None:
    with pytest.raises(ld.ExportError, match="one known embedding"):
        ld.export(tiny_t5, tmp_path / "b", precision="int8", quantize_embedding=True)
    ld.export(tied, tmp_path / "float")
    with pytest.raises(ld.ExportError, match="the graph is in fp32"):
        ld.export(tmp_path / "float", tmp_path / "b", quantize_embedding=True)
