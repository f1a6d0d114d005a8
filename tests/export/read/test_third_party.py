"""Graphs exported by other tools take adapters at the modules that the adapters name."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.files.peft import save_adapter
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import AdapterMismatchError, ExportError, ModelError, UsageError
from loradeploy.export.api import export
from loradeploy.export.match.modules.naming import FUSED_MODULES
from loradeploy.export.match.operators import MICROSOFT
from loradeploy.export.match.whole.parts import find_parts
from loradeploy.export.read.modules.find import Evidence, find_modules
from loradeploy.export.read.products.normalize import normalize_products
from loradeploy.export.read.values.cache import complete_cache
from loradeploy.runtime.decoding.caches.parts import parts_of
from loradeploy.runtime.decoding.graph import DecoderGraph
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.conftest import MakeAdapter, once
from tests.export import others, reference
from tests.export.graphs import IN, OUT, Builder
from tests.export.others import IDS, copy_of
from tests.export.reference import (
    apart,
    difference,
    factors,
    onnx_output,
    token_feeds,
    torch_output,
)
from tests.tolerances import tolerance
from tools.inputs import genai_builder

Graph = Callable[[str], Path]
needs_genai = pytest.mark.skipif(
    not genai_builder.PYTHON.exists(), reason="make setup makes .venv-genai"
)


@pytest.fixture(scope="session")
def built(shared: Path, tiny_llama: Path) -> Graph:
    """A function: precision → the tiny Llama exported by onnxruntime-genai's model builder."""

    def graph(precision: str) -> Path:
        place = shared / f"genai-{precision}"
        return once(place, lambda out: genai_builder.build(tiny_llama, out, precision))

    return graph


@pytest.fixture(scope="session")
def encoder(shared: Path, tiny_bert: Path) -> Graph:
    """A function: kind → the tiny BERT exported and quantized by other tools."""

    def graph(kind: str) -> Path:
        if kind in ("legacy", "dynamo"):
            return once(
                shared / f"encoder-{kind}",
                lambda out: others.export_with_torch(tiny_bert, out, dynamo=kind == "dynamo"),
            )
        exported = graph("legacy") / "model.onnx"
        make = {
            "nameless": others.without_names,
            "qdq": others.quantise_statically,
            "dynamic": others.quantise_dynamically,
        }[kind]
        return once(shared / f"encoder-{kind}", lambda out: make(exported, out))

    return graph


# -- onnxruntime-genai's builder ---------------------------------------------------------------


@needs_genai
@pytest.mark.parametrize("evidence", ["names", "checkpoint"])
def test_adapters_for_q_k_and_v_change_a_packed_projection(
    evidence: str, built: Graph, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    every = make_adapter(tiny_llama, r=4, seed=1, rank_pattern={"k_proj": 2})
    some = make_adapter(tiny_llama, r=3, seed=2, target_modules=["v_proj", "down_proj"])
    given = {"checkpoint": tiny_llama} if evidence == "checkpoint" else {}
    adapters = {"every": every, "some": some}
    manifest = export(built("fp32"), tmp_path / "bundle", adapters=adapters, **given)
    packed = [
        target for target in manifest.targets if target.weight.endswith("qkv_proj.MatMul.weight")
    ]
    assert [target.slice for target in packed[:3]] == [(0, 64), (64, 96), (96, 128)]
    assert manifest.base.kind == ("checkpoint" if given else "onnx")
    assert manifest.inputs[0].shape == ("batch", "sequence")
    assert manifest.inputs[2].shape == ("batch", 2, "past", 16)
    base = onnx_output(tmp_path / "bundle", IDS)
    assert difference(base, torch_output(tiny_llama, IDS)) < tolerance("torch-onnx-tiny")
    for adapter in adapters.values():
        adapted = onnx_output(tmp_path / "bundle", IDS, side=factors(tmp_path / "bundle", adapter))
        expected = torch_output(tiny_llama, IDS, adapter=adapter)
        assert difference(adapted, expected) < tolerance("torch-onnx-tiny")
        assert difference(adapted, base) > 0.1, "the adapter did nothing"


@needs_genai
def test_a_batch_of_different_lengths_generates_the_same_as_each_row_alone(
    built: Graph, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, r=4, seed=1)
    manifest = export(built("fp32"), tmp_path / "bundle", adapters={"mine": adapter})
    assert manifest.padding == "right"  # GroupQueryAttention counts from the start of a row
    assert manifest.cache_in_place
    generator = TextGenerator(AdapterSession(tmp_path / "bundle"))
    prompts = [[5, 17, 42, 99, 7], [9, 8], [7, 6, 5, 4]]
    names = ["mine", None, "mine"]
    together = generator.generate(prompts, names, max_new_tokens=10)
    for prompt, name, row in zip(prompts, names, together, strict=True):
        (alone,) = generator.generate([prompt], [name], max_new_tokens=10)
        assert row.token_ids == alone.token_ids


@needs_genai
def test_a_packed_projection_is_merged_in_parts(
    built: Graph, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, r=4, seed=1, use_dora=True)
    export(built("fp32"), tmp_path / "merged", adapters={"mine": adapter}, merge=True)
    merged = onnx_output(tmp_path / "merged", IDS)
    expected = torch_output(tiny_llama, IDS, adapter=adapter)
    assert difference(merged, expected) < tolerance("torch-onnx-tiny")


@needs_genai
def test_a_bundle_of_a_foreign_graph_is_exported_again(
    built: Graph, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, r=4, seed=1)
    first, again = tmp_path / "first", tmp_path / "again"
    before = export(built("fp32"), first, layout="rows", branches=True, checkpoint=tiny_llama)
    after = export(first, again, adapters={"mine": adapter}, layout="slots", branches=False)
    assert [t.module for t in after.targets] == [t.module for t in before.targets]
    assert after.base == before.base
    assert after.padding == before.padding
    adapted = onnx_output(again, IDS, side=factors(again, adapter))
    expected = torch_output(tiny_llama, IDS, adapter=adapter)
    assert difference(adapted, expected) < tolerance("torch-onnx-tiny")


@needs_genai
def test_a_prompt_is_processed_in_parts_only_by_graphs_traced_by_loradeploy(
    built: Graph, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A graph of another exporter may process several tokens after a past wrongly."""
    prompt = np.ones((1, 600), np.int64)
    for source, checkpoint, count in ((built("fp32"), tiny_llama, 1), (tiny_llama, None, 3)):
        first, again = (tmp_path / f"{count}-{name}" for name in ("first", "again"))
        export(source, first, checkpoint=checkpoint)
        export(first, again)
        for bundle in (first, again):
            session = AdapterSession(bundle)
            assert session.manifest.base.kind == "checkpoint"
            assert not session.manifest.whole_prompts
            assert len(parts_of(DecoderGraph.of(session, 0), prompt)) == count
    assert "several tokens after cached ones" not in caplog.text  # this graph is correct


@needs_genai
@pytest.mark.parametrize("merge", [False, True], ids=["side inputs", "merged"])
def test_trained_rows_need_the_checkpoint_if_it_is_unknown_whether_a_packed_head_is_tied(
    merge: bool, built: Graph, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """The builder's directory has no config.json; the head is not tied."""
    adapter = make_adapter(tiny_llama, scale=0.5, trainable_token_indices=[int(IDS[0, 0])])
    form: dict[str, Any] = {"merge": True, "requantize": True} if merge else {}
    graph, adapters = built("int4"), {"a": adapter}
    for source in (graph, tmp_path / "bundle"):
        if source != graph:
            export(graph, source)
        with pytest.raises(AdapterMismatchError, match="not known whether .*`checkpoint`") as found:
            export(source, tmp_path / "out", adapters=adapters, **form)
        assert "merge it" not in str(found.value)
    export(graph, tmp_path / "base", checkpoint=tiny_llama)
    export(graph, tmp_path / "out", adapters=adapters, checkpoint=tiny_llama, **form)
    session = AdapterSession(tmp_path / "out")
    feeds = token_feeds(reference.session(tmp_path / "base"), IDS)
    (adapted,) = session.run(["logits"], feeds, None if merge else "a")
    made = adapted - onnx_output(tmp_path / "base", IDS)
    change = torch_output(tiny_llama, IDS, adapter=adapter) - torch_output(tiny_llama, IDS)
    # The difference is the rounding to 4 bits, which the base has too.
    assert np.linalg.norm(made - change) < np.linalg.norm(change)


@needs_genai
@pytest.mark.parametrize("evidence", ["names", "checkpoint"])
def test_packed_int4_weights_keep_and_gain_an_adapter_effect(
    evidence: str, built: Graph, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, r=4, seed=1, scale=0.1)
    given = {"checkpoint": tiny_llama} if evidence == "checkpoint" else {}
    manifest = export(built("int4"), tmp_path / "bundle", adapters={"mine": adapter}, **given)
    assert manifest.precision == "int4"
    assert len(manifest.targets) == 14
    adapted = onnx_output(tmp_path / "bundle", IDS, side=factors(tmp_path / "bundle", adapter))
    expected = torch_output(tiny_llama, IDS, adapter=adapter)
    base = torch_output(tiny_llama, IDS)
    assert apart(adapted, expected) < tolerance("export-int4")
    assert apart(adapted, expected) < apart(base, expected) / 2, "the adapter is not in it"
    with pytest.raises(ExportError, match="already quantized"):
        export(built("int4"), tmp_path / "m", adapters={"mine": adapter}, merge=True)
    export(built("int4"), tmp_path / "m", adapters={"mine": adapter}, merge=True, requantize=True)
    merged = onnx_output(tmp_path / "m", IDS)
    assert apart(merged, expected) < apart(base, expected) / 2, "the adapter is not in it"


@needs_genai
def test_a_packed_projection_refuses_adapters_that_need_a_separate_one(
    built: Graph, tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    dora = make_adapter(tiny_llama, r=4, seed=1, use_dora=True)
    with pytest.raises(ExportError, match="q_proj is packed together with others.*merge"):
        export(built("fp32"), tmp_path / "out", adapters={"mine": dora})
    saved = make_adapter(
        tiny_llama, r=4, seed=1, target_modules=["o_proj"], modules_to_save=["v_proj"]
    )
    with pytest.raises(ExportError, match="v_proj"):
        export(built("fp32"), tmp_path / "out", adapters={"mine": saved})
    assert not (tmp_path / "out").exists()


@needs_genai
def test_a_cache_of_unknown_head_size_is_refused(built: Graph, tmp_path: Path) -> None:
    place = copy_of(built("fp32"), tmp_path / "graph")
    (place / "genai_config.json").unlink()
    with pytest.raises(ExportError, match=r"last size of past_key_values\.0\.key"):
        export(place, tmp_path / "out")


# -- torch.onnx, optimum, quantized graphs -----------------------------------------------------


@pytest.mark.parametrize("symbol", [None, "d"])
def test_the_head_size_is_not_confused_with_another_axis(
    symbol: str | None, tmp_path: Path
) -> None:
    """Two axes without a symbol are not the same axis."""
    b = Builder()
    shape: list[Any] = [None, 2, None, symbol]
    past = b.input("past_key_values.0.key", shape)
    model = b.model(b.node("Identity", [past], list(shape), name="present.0.key"))
    (tmp_path / "config.json").write_text(json.dumps({"head_dim": 16}))
    complete_cache(model, tmp_path, None)
    for value in (*model.graph.inputs, *model.graph.outputs):
        sizes = [size if isinstance(size, int) else size.value for size in value.shape]
        assert sizes == [None, 2, None, 16], value.name


@pytest.mark.breadth(2)
@pytest.mark.parametrize(
    ("kind", "evidence", "found_by"),
    [
        ("legacy", "map", "the given map"),
        ("legacy", "checkpoint", "weight identity"),
        ("dynamo", "checkpoint", "weight identity"),
        ("nameless", "checkpoint", "weight identity"),
    ],
)
def test_an_encoder_of_another_exporter_takes_adapters(
    kind: str,
    evidence: str,
    found_by: str,
    encoder: Graph,
    tiny_bert: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    adapter = make_adapter(tiny_bert, r=4, seed=1, task="feature-extraction", scale=0.1)
    given: dict[str, Path] = {"checkpoint": tiny_bert}
    if evidence == "map":
        rules = {
            r"/encoder/encoder/layer\.(\d+)/(\w+)/(\w+)/MatMul": r"encoder.layer.\1.\2.\3",
            r"/encoder/encoder/layer\.(\d+)/(\w+)/(\w+)/(\w+)/MatMul": r"encoder.layer.\1.\2.\3.\4",
            "/encoder/pooler/dense/Gemm": "pooler.dense",
        }
        (tmp_path / "map.json").write_text(json.dumps(rules))
        given = {"module_map": tmp_path / "map.json"}
    manifest = export(encoder(kind), tmp_path / "bundle", adapters={"mine": adapter}, **given)
    assert {target.found_by for target in manifest.targets} == {found_by}
    assert len(manifest.targets) == 13
    base = onnx_output(tmp_path / "bundle", IDS)
    adapted = onnx_output(tmp_path / "bundle", IDS, side=factors(tmp_path / "bundle", adapter))
    options = {"task": "feature-extraction"}
    assert difference(base, torch_output(tiny_bert, IDS, **options)) < tolerance("torch-onnx-tiny")
    expected = torch_output(tiny_bert, IDS, adapter=adapter, **options)
    assert difference(adapted, expected) < tolerance("torch-onnx-tiny")
    assert difference(adapted, base) > 0.1, "the adapter did nothing"


def test_weights_that_are_also_graph_inputs_are_weights(
    encoder: Graph, tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    old = copy_of(encoder("legacy"), tmp_path / "old")
    model = ir.load(old / "model.onnx")
    model.graph.inputs.extend(model.graph.initializers.values())  # as before ONNX's IR version 4
    ir.save(model, old / "model.onnx")
    adapter = make_adapter(tiny_bert, r=4, seed=1, task="feature-extraction", scale=0.1)
    place = tmp_path / "bundle"
    export(old, place, adapters={"mine": adapter}, checkpoint=tiny_bert)
    adapted = AdapterSession(place).run(
        ["last_hidden_state"], {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}, "mine"
    )[0]
    expected = torch_output(tiny_bert, IDS, adapter=adapter, task="feature-extraction")
    assert difference(adapted, expected) < tolerance("torch-onnx-tiny")


@pytest.mark.parametrize("kind", ["qdq", "dynamic"])
def test_int8_graphs_take_an_adapter_after_their_rounding(
    kind: str, encoder: Graph, tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_bert, r=4, seed=1, task="feature-extraction", scale=0.1)
    place = tmp_path / "bundle"
    manifest = export(encoder(kind), place, adapters={"mine": adapter}, checkpoint=tiny_bert)
    assert manifest.precision == "int8"
    options = {"task": "feature-extraction"}
    base = torch_output(tiny_bert, IDS, **options)
    expected = torch_output(tiny_bert, IDS, adapter=adapter, **options)
    adapted = onnx_output(place, IDS, side=factors(place, adapter))
    assert apart(adapted, expected) < apart(base, expected) / 10, "the adapter is not in it"


# -- what is unknown -----------------------------------------------------------------------


def test_unidentified_products_are_listed(
    encoder: Graph, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ExportError, match="no linear layer.*was identified"):
        export(encoder("nameless"), tmp_path / "out")
    (listed,) = (text for text in caplog.messages if "its module is not known" in text)
    assert listed.count("→") == 6
    assert listed.endswith("and 7 more")


def test_an_adapter_for_a_module_that_was_not_found_is_refused(
    encoder: Graph, tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_bert, r=4, seed=1, task="feature-extraction", scale=0.1)
    rules = {r"/encoder/encoder/layer\.(\d+)/output/dense/MatMul": r"encoder.layer.\1.output.dense"}
    (tmp_path / "map.json").write_text(json.dumps(rules))
    with pytest.raises(AdapterMismatchError, match=r"encoder\.layer\.0\.attention"):
        export(
            encoder("legacy"),
            tmp_path / "out",
            adapters={"mine": adapter},
            module_map=tmp_path / "map.json",
        )


def test_another_checkpoint_is_detected_by_its_weights(
    encoder: Graph, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="another"):
        export(encoder("legacy"), tmp_path / "out", checkpoint=tiny_llama)


def test_modules_of_the_checkpoint_that_the_graph_lacks_are_listed(
    encoder: Graph, tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = copy_of(encoder("legacy"), tmp_path / "graph")
    model = ir.load(broken / "model.onnx")
    weight = next(
        value
        for node in model.graph
        if str(node.name).endswith("layer.1/output/dense/MatMul")
        and (value := node.inputs[1]) is not None
    )
    assert weight.const_value is not None
    numbers = np.random.default_rng(0).standard_normal(weight.const_value.numpy().shape)
    weight.const_value = ir.tensor(numbers.astype(np.float32), name=weight.name)
    ir.save(model, broken / "model.onnx")
    manifest = export(broken, tmp_path / "out", checkpoint=tiny_bert)
    assert "encoder.layer.1.output.dense" not in {t.module for t in manifest.targets}
    assert "that were not found in the graph: encoder.layer.1.output.dense" in caplog.text


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"/nowhere/.*": "a.b"}, "no product of the graph is named '/nowhere/"),
        ({"(": "a"}, "is not a regular expression"),
        ({"/.*": 3}, "needs a module, or a list"),
        ({"/.*": [["a", 0]]}, "needs a module, or a list"),
        ({"/.*": r"\1"}, "has no group"),
        ({"/.*pooler.*": [["a", 3], ["b", 4]]}, "has 7 outputs"),
    ],
)
def test_an_invalid_module_map_is_refused(
    rules: dict[str, object], message: str, encoder: Graph, tmp_path: Path
) -> None:
    (tmp_path / "map.json").write_text(json.dumps(rules))
    with pytest.raises(UsageError, match=message):
        export(encoder("legacy"), tmp_path / "out", module_map=tmp_path / "map.json")


def test_evidence_options_are_only_for_onnx_models(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are for ONNX models"):
        export(tiny_bert, tmp_path / "out", checkpoint=tiny_bert)


def test_a_directory_that_is_not_a_checkpoint_is_refused(encoder: Graph, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has neither .safetensors nor .onnx files"):
        export(encoder("legacy"), tmp_path / "out", checkpoint=tmp_path)
    assert not (tmp_path / "out").exists()


@needs_genai
def test_a_bundle_of_another_exporter_keeps_its_padding_side(built: Graph, tmp_path: Path) -> None:
    export(built("fp32"), tmp_path / "bundle")
    assert read_manifest(tmp_path / "bundle").padding == "right"


Q, K, V = (f"model.layers.0.self_attn.{part}_proj" for part in "qkv")


def _rotating(place: Path, config: dict[str, object] | None, *, packed: bool = False) -> ir.Model:
    """q and k with interleaved rows, and v, identified only by name; one product if `packed`."""
    b = Builder()
    x = b.input("x", ["batch", "sequence", IN])
    if packed:
        fused = b.node("MatMul", [x, b.weight("w", IN, 3 * OUT)], name="fused")
        b.nodes[0].metadata_props[FUSED_MODULES] = json.dumps([[m, OUT] for m in (Q, K, V)])
        parts = [fused]
    else:
        parts = [b.node("MatMul", [x, b.weight(m, IN, OUT)], module=m) for m in (Q, K, V)]
    place.mkdir(exist_ok=True)
    if config is not None:
        (place / "config.json").write_text(json.dumps(config))
    return b.model(b.node("RotaryEmbedding", [parts[0]], interleaved=1), *parts[1:])


@pytest.mark.parametrize(
    ("config", "refused"),
    [({"model_type": "llama"}, True), (None, True), ({"model_type": "glm"}, False)],
    ids=["llama", "unknown", "glm"],
)
def test_interleaved_rows_are_not_identified_by_names_alone(
    config: dict[str, object] | None, refused: bool, tmp_path: Path
) -> None:
    model = _rotating(tmp_path, config)
    adapter = _pairs([Q])
    if not refused:
        assert Q in find_modules(model, tmp_path, Evidence(), [adapter]).linears
        return
    with pytest.raises(ExportError, match=r"q_proj: the graph rotates interleaved rows"):
        find_modules(model, tmp_path, Evidence(), [adapter])


@pytest.mark.parametrize("op", ["FusedMatMul", "Gemm"])
@pytest.mark.parametrize("stored", ["nothing", "W", "W divided by alpha"])
def test_a_scaled_product_is_not_identified_by_names_alone(
    op: str, stored: str, tmp_path: Path
) -> None:
    """y = α x W scales the update by α too, unless W was divided by α."""
    b, module, alpha = Builder(), "block.proj", 0.5
    x, w = b.input("x", ["batch", IN]), b.weight("w", IN, OUT)
    domain = "" if op == "Gemm" else "com.microsoft"
    y = b.node(op, [x, w], ["batch", OUT], module=module, domain=domain, alpha=alpha)
    other = b.node("MatMul", [y, b.weight("v", OUT, IN)], ["batch", IN], module="block.other")
    model = b.model(other)
    pair = Factors(np.ones((2, IN), np.float32), np.ones((OUT, 2), np.float32))
    adapter = Adapter(AdapterConfig(r=2, lora_alpha=4, target_modules=("proj",)), {module: pair})
    W, V = (model.graph.initializers[n].const_value.numpy() for n in ("w", "v"))
    normalize_products(model.graph)
    if stored == "nothing":
        assert find_modules(model, tmp_path, Evidence(), []).linears.keys() == {"block.other"}
        with pytest.raises(ExportError, match=r"block\.proj: .* by 0\.5, .*: give `checkpoint`"):
            find_modules(model, tmp_path, Evidence(), [adapter])
        return
    divided = stored != "W"
    matrix = np.ascontiguousarray(W.T * (alpha if divided else 1))
    weights = {f"{module}.weight": matrix, "block.other.weight": np.ascontiguousarray(V.T)}
    save_file(weights, tmp_path / "model.safetensors")
    evidence = Evidence(checkpoint=tmp_path)
    # The weight of a Gemm is multiplied by its alpha, that of a FusedMatMul is not changed.
    if divided == (op == "Gemm"):
        assert module in find_modules(model, tmp_path, evidence, [adapter]).linears
        assert module in find_modules(model, tmp_path, Evidence(), [adapter]).linears, "again"
    else:
        with pytest.raises(ExportError, match="is named after block.proj"):
            find_modules(model, tmp_path, evidence, [adapter])


def test_a_layer_whose_weight_a_product_without_a_module_uses_too_takes_no_adapters(
    tmp_path: Path,
) -> None:
    """It may be a second call of the layer, which an adapter would not change."""
    b, module = Builder(), "block.proj"
    x, w = b.input("x", ["batch", IN]), b.weight("w", IN, IN)
    y = b.node("MatMul", [x, w], ["batch", IN], module=module)
    again = b.node("MatMul", [y, w], ["batch", IN])
    model = b.model(
        b.node("MatMul", [again, b.weight("v", IN, IN)], ["batch", IN], module="block.other")
    )
    pair = Factors(np.ones((2, IN), np.float32), np.ones((IN, 2), np.float32))
    adapter = Adapter(AdapterConfig(r=2, lora_alpha=4, target_modules=("proj",)), {module: pair})
    assert find_modules(model, tmp_path, Evidence(), []).linears.keys() == {"block.other"}
    with pytest.raises(ExportError, match=r"block\.proj: .* has the same weight, .* `module_map`"):
        find_modules(model, tmp_path, Evidence(), [adapter])


def test_a_graph_and_its_checkpoint_take_adapters_whose_names_have_a_prefix(
    tmp_path: Path,
) -> None:
    """Graph and checkpoint are of BertModel, the adapter of BertForMaskedLM."""
    b = Builder()
    x = b.input("x", ["batch", IN])
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)], ["batch", OUT], module="block.proj")
    z = b.node("MatMul", [y, b.weight("v", OUT, IN)], ["batch", IN], module="block.other")
    model = b.model(z)
    stored = {"w": "block.proj", "v": "block.other"}
    weights = {
        f"{module}.weight": np.ascontiguousarray(model.graph.initializers[n].const_value.numpy().T)
        for n, module in stored.items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    pair = Factors(np.ones((2, IN), np.float32), np.ones((OUT, 2), np.float32))
    config = AdapterConfig(r=2, lora_alpha=4, target_modules=("proj",))
    adapter = Adapter(config, {"bert.block.proj": pair})
    found = find_modules(model, tmp_path, Evidence(checkpoint=tmp_path), [adapter])
    assert found.linears.keys() == {"bert.block.proj", "bert.block.other"}


@pytest.mark.parametrize(
    ("graph", "adapter", "expected"),
    [
        ("wrapper.model.", "model.", "model.embed"),
        ("", "model.", "model.embed"),
        ("model.", "model.", "model.embed"),
    ],
    ids=["a wrapper", "the bare model", "the same"],
)
def test_an_embedding_is_named_as_the_linear_layers_that_weights_identify(
    graph: str, adapter: str, expected: str, tmp_path: Path
) -> None:
    b = Builder()
    ids = b.input("ids", ["batch", "sequence"])
    table = b.weight("e", 7, IN)
    x = b.node("Gather", [table, ids], ["batch", "sequence", IN], module=f"{graph}embed")
    y = b.node(
        "MatMul", [x, b.weight("w", IN, OUT)], ["batch", "sequence", OUT], module=f"{graph}q"
    )
    model = b.model(y)
    weight = np.ascontiguousarray(model.graph.initializers["w"].const_value.numpy().T)
    save_file({f"{adapter}q.weight": weight}, tmp_path / "model.safetensors")
    found = find_modules(model, tmp_path, Evidence(checkpoint=tmp_path), [])
    assert found.linears.keys() == {f"{adapter}q"}
    assert find_parts(model).keys() == {expected}


@pytest.mark.parametrize("names", ["none", "others"])
def test_parts_whose_weight_one_module_of_the_checkpoint_has_are_named_by_it(
    names: str, tmp_path: Path
) -> None:
    b = Builder()
    ids, image = b.input("ids", ["batch", 5]), b.input("image", ["batch", 3, 8, 8])
    named: Any = {} if names == "none" else {"module": "m.other"}
    constants = {
        "embed": b.weight("e", 7, IN),
        "norm": b.weight("s", IN),
        "patches": b.weight("c", 2, 3, 4, 4),
    }
    x = b.node("Gather", [constants["embed"], ids], ["batch", 5, IN], **named)
    x = b.node("LayerNormalization", [x, constants["norm"]], ["batch", 5, IN])
    same = [b.constant(f"one{at}", np.ones(IN, np.float32)) for at in range(2)]
    for one in same:
        x = b.node("LayerNormalization", [x, one], ["batch", 5, IN])
    y = b.node("MatMul", [x, b.weight("w", IN, OUT)], ["batch", 5, OUT])
    z = b.node("Conv", [image, constants["patches"]], ["batch", 2, 2, 2], kernel_shape=[4, 4])
    model = b.model(y, z)

    def numbers_of(value: ir.Value) -> Any:
        assert value.const_value is not None
        return value.const_value.numpy()

    weights = {f"m.{name}.weight": numbers_of(value) for name, value in constants.items()}
    weights |= {f"m.same.{at}.weight": numbers_of(one) for at, one in enumerate(same)}
    weights["m.q.weight"] = np.ascontiguousarray(numbers_of(model.graph.initializers["w"]).T)
    save_file(weights, tmp_path / "model.safetensors")
    find_modules(model, tmp_path, Evidence(checkpoint=tmp_path), [])
    assert find_parts(model).keys() == {"m.embed", "m.norm", "m.patches"}


@pytest.mark.parametrize(
    ("op", "advice"),
    [
        ("MatMulFpQ4", "give the graph as it was before its operators were fused or quantized"),
        ("QMoE", "export the checkpoint, whose experts take them"),
    ],
)
def test_operators_that_take_no_adapters_are_named_where_the_checkpoint_has_no_match(
    op: str, advice: str, tmp_path: Path
) -> None:
    b = Builder()
    x = b.input("x", ["batch", IN])
    inputs = [x, b.weight("packed", IN * OUT // 2), b.weight("absmax", 2)]
    model = b.model(b.node(op, inputs, ["batch", OUT], domain="com.microsoft"))
    save_file({"block.proj.weight": np.ones((OUT, IN), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=rf"layers in {op} \(1\) take no adapters: {advice}"):
        find_modules(model, tmp_path, Evidence(checkpoint=tmp_path), [])


@pytest.mark.parametrize("packed", [False, True], ids=["each", "packed"])
def test_interleaved_rows_have_no_side_inputs_without_a_checkpoint(
    packed: bool, tmp_path: Path
) -> None:
    model = _rotating(tmp_path, {"model_type": "llama"}, packed=packed)
    for _ in range(2):  # the second time with the metadata written by the first
        found = find_modules(model, tmp_path, Evidence(), []).linears
        assert list(found) == [V]
        assert found[V].slice == ((2 * OUT, 3 * OUT) if packed else None)
    assert set(find_modules(model, tmp_path, Evidence(), [], proven=True).linears) == {Q, K, V}


def test_an_adapter_loaded_later_is_refused_for_interleaved_rows(tmp_path: Path) -> None:
    b = Builder()
    ids, at = (
        b.input(n, ["batch", "sequence"], ir.DataType.INT64) for n in ("input_ids", "position_ids")
    )
    x = b.node("Gather", [b.weight("words", 50, IN), ids])
    q, v = (b.node("MatMul", [x, b.weight(m, IN, OUT)], module=m) for m in (Q, V))
    tables = [b.weight("cos", 64, OUT // 2), b.weight("sin", 64, OUT // 2)]
    turned = b.node(
        "RotaryEmbedding", [q, at, *tables], domain=MICROSOFT, interleaved=1, num_heads=1
    )
    y = b.node("Add", [turned, v], ["batch", "sequence", OUT], name="last_hidden_state")
    model = b.model(y)
    model.graph.opset_imports[MICROSOFT] = 1
    ir.save(model, tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 50}))
    manifest = export(tmp_path / "model.onnx", tmp_path / "bundle", task="feature-extraction")
    assert [t.module for t in manifest.targets] == [V]
    session = AdapterSession(tmp_path / "bundle")
    for name, modules in (("q", [Q]), ("both", [Q, V]), ("v", [V])):
        save_adapter(_pairs(modules), tmp_path / name)
    session.load("v", tmp_path / "v")
    for name in ("q", "both"):
        with pytest.raises(
            AdapterMismatchError, match=r"q_proj is not .*`checkpoint`, which identifies"
        ):
            session.load(name, tmp_path / name)


def _pairs(modules: list[str]) -> Adapter:
    """Return an adapter for the given modules [in] → [out]."""
    pair = Factors(np.ones((2, IN), np.float32), np.ones((OUT, 2), np.float32))
    config = AdapterConfig(r=2, lora_alpha=4, target_modules=tuple(modules))
    return Adapter(config, dict.fromkeys(modules, pair))


@pytest.mark.parametrize("prefix", ["", "wrapper."])
@pytest.mark.parametrize(
    ("evidence", "folded", "message"),
    [
        ("names", True, "is not named after it, as if a norm or a factor was folded into it"),
        ("checkpoint", True, r"is not m.patches.weight of the checkpoint; a norm or a factor"),
        ("names", False, None),
        ("checkpoint", False, None),
    ],
)
def test_a_convolution_into_which_a_norm_was_folded_takes_no_adapter(
    evidence: str, folded: bool, message: str | None, prefix: str, tmp_path: Path
) -> None:
    b = Builder()
    x, image = b.input("x", ["batch", IN]), b.input("image", ["batch", 3, 8, 8])
    weight = b.weight("onnx::Conv_63" if folded else f"{prefix}m.patches.weight", 2, 3, 4, 4)
    y = b.node(
        "Conv",
        [image, weight],
        ["batch", 2, 2, 2],
        name=f"/{prefix.replace('.', '/')}m/patches/Conv",
        kernel_shape=[4, 4],
    )
    z = b.node("MatMul", [x, b.weight("w", IN, OUT)], ["batch", OUT], module=f"{prefix}m.q")
    model = b.model(y, z)
    graph = model.graph.initializers
    assert weight.const_value is not None
    kernel = weight.const_value.numpy()
    weights = {
        "m.q.weight": np.ascontiguousarray(graph["w"].const_value.numpy().T),
        "m.patches.weight": 2 * kernel if folded else kernel,
    }
    save_file(weights, tmp_path / "model.safetensors")
    pair = Factors(
        np.ones((2, 3, 4, 4), np.float32), np.ones((2, 2, 1, 1), np.float32), kind="conv2d"
    )
    config = AdapterConfig(r=2, lora_alpha=4, target_modules=("patches",))
    adapter = Adapter(config, {"m.patches": pair})
    proof = Evidence(checkpoint=tmp_path) if evidence == "checkpoint" else Evidence()
    refused = nullcontext() if message is None else pytest.raises(ExportError, match=message)
    with refused:
        find_modules(model, tmp_path, proof, [adapter])
