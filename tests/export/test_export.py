from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from loradeploy.adapter.files.digest import base_digest
from loradeploy.adapter.files.peft import load_adapter
from loradeploy.bundle.manifest import read_manifest
from loradeploy.export.api import export
from tests.conftest import ROOT, MakeAdapter
from tests.export.reference import (
    difference,
    factors,
    mixed_batch,
    onnx_output,
    session,
    token_feeds,
    torch_output,
)
from tests.tolerances import tolerance

Ids = NDArray[np.int64]
VISIBLE = 1e-2  # the least change by an adapter: with less, tests would pass without an adapter


@pytest.fixture(scope="module")
def ids() -> Ids:
    return np.random.default_rng(0).integers(3, 500, (2, 9))


@pytest.fixture(params=["llama", "gpt2"])
def decoder(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    name = request.param
    return (
        request.getfixturevalue(f"tiny_{name}"),
        request.getfixturevalue(f"tiny_{name}_bundle"),
    )


# -- decoders ----------------------------------------------------------------------------------


def test_without_factors_the_graph_is_the_base(decoder: tuple[Path, Path], ids: Ids) -> None:
    model, bundle = decoder
    assert difference(onnx_output(bundle, ids), torch_output(model, ids)) <= tolerance(
        "torch-onnx-tiny"
    )


def test_with_factors_the_graph_is_the_adapted_model(
    decoder: tuple[Path, Path], ids: Ids, make_adapter: MakeAdapter
) -> None:
    model, bundle = decoder
    adapter = make_adapter(model)
    adapted = onnx_output(bundle, ids, side=factors(bundle, adapter))
    assert difference(adapted, torch_output(model, ids, adapter=adapter)) <= tolerance(
        "torch-onnx-tiny"
    )
    assert difference(adapted, onnx_output(bundle, ids)) > VISIBLE


def test_merged_is_the_adapted_model(
    decoder: tuple[Path, Path], ids: Ids, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, _ = decoder
    adapter = make_adapter(model)
    manifest = export(model, tmp_path / "merged", adapters=[adapter], merge=True)
    merged = onnx_output(tmp_path / "merged", ids)
    assert difference(merged, torch_output(model, ids, adapter=adapter)) <= tolerance(
        "torch-onnx-tiny"
    )
    assert difference(merged, torch_output(model, ids)) > VISIBLE
    assert manifest.mode == "merged"
    assert manifest.merged_adapter is not None
    assert manifest.merged_adapter.digest == load_adapter(adapter).digest
    assert session(tmp_path / "merged").get_overridable_initializers() == []


def test_each_row_of_a_mixed_batch_equals_its_solo_run(
    decoder: tuple[Path, Path], make_adapter: MakeAdapter
) -> None:
    model, bundle = decoder
    small = factors(bundle, make_adapter(model, r=2, seed=1))
    large = factors(bundle, make_adapter(model, r=8, seed=2))
    row = np.random.default_rng(1).integers(3, 500, (1, 7))
    slots = np.array([2, 0, 1, 2])
    side = mixed_batch(bundle, [{}, small, large], slots)
    mixed = onnx_output(bundle, row.repeat(4, axis=0), side=side)
    for number, slot in enumerate(slots):
        solo = onnx_output(bundle, row, side=[{}, small, large][slot])
        assert difference(mixed[number], solo[0]) <= tolerance("rows"), f"row {number}"
    assert difference(mixed[0], mixed[1]) > VISIBLE


def test_left_padding_changes_nothing(decoder: tuple[Path, Path]) -> None:
    _, bundle = decoder
    generator = np.random.default_rng(2)
    short, long = generator.integers(3, 500, (1, 4)), generator.integers(3, 500, (1, 9))
    ids = np.concatenate([np.pad(short, [(0, 0), (5, 0)]), long])
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    batch = onnx_output(bundle, ids, mask)
    assert np.isfinite(batch).all()
    assert difference(batch[0, 5:], onnx_output(bundle, short)[0]) <= tolerance("rows")
    assert difference(batch[1], onnx_output(bundle, long)[0]) <= tolerance("rows")


def test_decoding_with_the_cache_equals_one_pass(decoder: tuple[Path, Path]) -> None:
    _, bundle = decoder
    graph = session(bundle)
    ids = np.random.default_rng(3).integers(3, 500, (2, 8))
    ids[0, :3] = 0
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    whole = graph.run(["logits"], token_feeds(graph, ids, mask))[0]
    names = [value.name for value in graph.get_outputs()]
    feeds = token_feeds(graph, ids[:, :5], mask[:, :5])
    for step in (5, 6, 7):
        result = dict(zip(names, graph.run(None, feeds), strict=True))
        feeds = {
            "input_ids": ids[:, step : step + 1],
            "attention_mask": mask[:, : step + 1],
            "position_ids": mask[:, : step + 1].sum(axis=1, keepdims=True) - 1,
            **{
                name.replace("present.", "past_key_values."): value
                for name, value in result.items()
                if name != "logits"
            },
        }
        logits = graph.run(["logits"], feeds)[0]
        assert difference(logits[:, 0], whole[:, step]) <= tolerance("rows"), f"token {step}"


def test_native_adapters_of_plain_onnxruntime_are_the_adapted_model(
    decoder: tuple[Path, Path], ids: Ids, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, bundle = decoder
    adapter = make_adapter(model)
    export(bundle, tmp_path / "b", adapters={"sport": adapter})
    native = onnxruntime.LoraAdapter()
    native.Load(str(tmp_path / "b" / "adapters" / "sport.onnx_adapter"))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(native)
    graph = session(tmp_path / "b")
    logits = graph.run(["logits"], token_feeds(graph, ids), options)[0]
    assert difference(logits, torch_output(model, ids, adapter=adapter)) <= tolerance(
        "torch-onnx-tiny"
    )


def test_input_and_output_names_and_dimensions_follow_the_ecosystem(
    tiny_llama_bundle: Path,
) -> None:
    manifest = read_manifest(tiny_llama_bundle)
    assert [spec.name for spec in manifest.inputs] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")),
    ]
    assert [spec.name for spec in manifest.outputs] == [
        "logits",
        *(f"present.{i}.{part}" for i in range(2) for part in ("key", "value")),
    ]
    shapes = {spec.name: spec.shape for spec in (*manifest.inputs, *manifest.outputs)}
    assert shapes["input_ids"] == ("batch", "sequence")
    assert shapes["attention_mask"] == ("batch", "total")
    assert shapes["past_key_values.0.key"] == ("batch", 2, "past", 16)
    assert shapes["present.1.value"] == ("batch", 2, "total", 16)
    assert shapes["logits"] == ("batch", "kept", 512)  # all positions, unless some are selected


def test_every_linear_but_the_output_head_is_a_target(tiny_llama_bundle: Path) -> None:
    modules = {target.module for target in read_manifest(tiny_llama_bundle).targets}
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert modules == {f"model.layers.{i}.{part}" for i in range(2) for part in parts}


def test_the_manifest_records_how_a_module_was_found(tiny_llama_bundle: Path) -> None:
    assert {target.found_by for target in read_manifest(tiny_llama_bundle).targets} == {
        "metadata pkg.torch.onnx.name_scopes"
    }


def test_nothing_of_the_exporting_machine_is_in_the_graph(tiny_llama_bundle: Path) -> None:
    content = (tiny_llama_bundle / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert str(Path.home()).encode() not in content


def test_an_adapter_for_the_output_head_makes_it_a_target(
    tiny_gpt2: Path, ids: Ids, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_gpt2, target_modules=["lm_head"])
    export(tiny_gpt2, tmp_path / "b", adapters={"head": adapter})
    expected = torch_output(tiny_gpt2, ids, adapter=adapter)
    side = factors(tmp_path / "b", adapter)
    assert difference(onnx_output(tmp_path / "b", ids, side=side), expected) <= tolerance(
        "torch-onnx-tiny"
    )
    assert difference(onnx_output(tmp_path / "b", ids), expected) > VISIBLE


def test_merging_into_a_tied_head_leaves_the_embedding_alone(
    tiny_gpt2: Path, ids: Ids, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_gpt2, target_modules=["lm_head", "c_attn"])
    export(tiny_gpt2, tmp_path / "b", adapters=[adapter], merge=True)
    expected = torch_output(tiny_gpt2, ids, adapter=adapter)
    assert difference(onnx_output(tmp_path / "b", ids), expected) <= tolerance("torch-onnx-tiny")
    assert difference(expected, torch_output(tiny_gpt2, ids)) > VISIBLE


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}}])
def test_scaling_variants_reach_the_merged_graph(
    tiny_llama: Path,
    ids: Ids,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    options: dict[str, object],
) -> None:
    adapter = make_adapter(tiny_llama, **options)
    export(tiny_llama, tmp_path / "b", adapters=[adapter], merge=True)
    expected = torch_output(tiny_llama, ids, adapter=adapter)
    assert difference(onnx_output(tmp_path / "b", ids), expected) <= tolerance("torch-onnx-tiny")


# -- encoders ----------------------------------------------------------------------------------


def test_an_encoder_outputs_its_last_hidden_state(
    tiny_bert: Path, ids: Ids, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_bert, task="feature-extraction")
    manifest = export(tiny_bert, tmp_path / "b")
    assert manifest.task == "feature-extraction"
    assert [spec.name for spec in manifest.outputs] == ["last_hidden_state", "pooler_output"]
    base = torch_output(tiny_bert, ids, task="feature-extraction")
    adapted = torch_output(tiny_bert, ids, task="feature-extraction", adapter=adapter)
    side = factors(tmp_path / "b", adapter)
    allowed = tolerance("torch-onnx-tiny")
    assert difference(onnx_output(tmp_path / "b", ids), base) <= allowed
    assert difference(onnx_output(tmp_path / "b", ids, side=side), adapted) <= allowed
    assert difference(base, adapted) > VISIBLE


@pytest.fixture
def classifier_adapters(tiny_bert: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    common = {"task": "sequence-classification", "num_labels": 3}
    return {
        "one": make_adapter(tiny_bert, seed=1, **common),
        "two": make_adapter(tiny_bert, seed=2, r=8, **common),
    }


def test_a_classifier_takes_heads_and_factors_per_row(
    tiny_bert: Path, ids: Ids, classifier_adapters: dict[str, Path], tmp_path: Path
) -> None:
    manifest = export(tiny_bert, tmp_path / "b", adapters=classifier_adapters)
    assert manifest.task == "sequence-classification"
    assert {saved.parameter for saved in manifest.saved} == {"classifier.weight", "classifier.bias"}
    solo = {}
    for name, adapter in classifier_adapters.items():
        expected = torch_output(
            tiny_bert, ids, task="sequence-classification", adapter=adapter, labels=3
        )
        side = factors(tmp_path / "b", adapter)
        solo[name] = onnx_output(tmp_path / "b", ids, side=side)
        assert difference(solo[name], expected) <= tolerance("torch-onnx-tiny"), name
    slots = [{}, *(factors(tmp_path / "b", a) for a in classifier_adapters.values())]
    side = mixed_batch(tmp_path / "b", slots, np.array([2, 0]))
    mixed = onnx_output(tmp_path / "b", ids, side=side)
    assert difference(mixed[0], solo["two"][0]) <= tolerance("rows")
    assert difference(mixed[1], onnx_output(tmp_path / "b", ids)[1]) <= tolerance("rows")
    assert difference(solo["one"], solo["two"]) > VISIBLE


def test_a_classifier_merges_its_head(
    tiny_bert: Path, ids: Ids, classifier_adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter = classifier_adapters["one"]
    expected = torch_output(
        tiny_bert, ids, task="sequence-classification", adapter=adapter, labels=3
    )
    export(tiny_bert, tmp_path / "merged", adapters=[adapter], merge=True)
    export(tiny_bert, tmp_path / "side", adapters=classifier_adapters)
    export(tmp_path / "side", tmp_path / "later", adapters=[adapter], merge=True)
    for place in ("merged", "later"):
        logits = onnx_output(tmp_path / place, ids)
        assert difference(logits, expected) <= tolerance("torch-onnx-tiny"), place
        assert logits.shape == (2, 3)


def test_padding_of_a_classifier_changes_nothing(tiny_bert_bundle: Path, tiny_bert: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((1, 48, 2)).astype(np.float32)
    head = {"classifier.weight": weight}
    short = np.random.default_rng(1).integers(3, 500, (1, 5))
    ids = np.pad(short, [(0, 0), (0, 4)])
    mask = np.pad(np.ones_like(short), [(0, 0), (0, 4)])
    padded = onnx_output(tiny_bert_bundle, ids, mask, side=head)
    assert difference(padded, onnx_output(tiny_bert_bundle, short, side=head)) <= tolerance("rows")


def test_a_head_that_the_checkpoint_lacks_is_zero(tiny_bert_bundle: Path, ids: Ids) -> None:
    assert not onnx_output(tiny_bert_bundle, ids).any()


def test_the_labels_of_the_adapters_are_in_the_config(
    classifier_adapters: dict[str, Path], tiny_bert: Path, tmp_path: Path
) -> None:
    import dataclasses

    from loradeploy.adapter.files.peft import save_adapter

    named = dataclasses.replace(
        load_adapter(classifier_adapters["one"]), labels=("tech", "sport", "politics")
    )
    save_adapter(named, tmp_path / "named")
    export(tiny_bert, tmp_path / "b", adapters={"named": tmp_path / "named"})
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["id2label"] == {"0": "tech", "1": "sport", "2": "politics"}


def test_a_decoder_classifies(tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llama, task="sequence-classification", num_labels=3)
    export(tiny_llama, tmp_path / "b", adapters={"topic": adapter})
    ids = np.random.default_rng(5).integers(3, 500, (2, 7))
    ids[1, 5:] = 0
    mask = (ids != 0).astype(np.int64)
    expected = torch_output(
        tiny_llama, ids, mask, task="sequence-classification", adapter=adapter, labels=3
    )
    side = factors(tmp_path / "b", adapter)
    logits = onnx_output(tmp_path / "b", ids, mask, side=side)
    assert difference(logits, expected) <= tolerance("torch-onnx-tiny")
    assert np.abs(expected).max() > VISIBLE


# -- the bundle's files ------------------------------------------------------------------------


def test_the_bundle_has_the_files_that_the_runtime_needs(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama)
    manifest = export(tiny_llama, tmp_path / "b", adapters={"sport": adapter})
    names = {str(file.relative_to(tmp_path / "b")) for file in (tmp_path / "b").rglob("*.*")}
    assert names >= {
        "loradeploy.json",
        "model.onnx",
        "model.onnx.data",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "genai_config.json",
        "adapters/sport/adapter_config.json",
        "adapters/sport/adapter_model.safetensors",
        "adapters/sport.onnx_adapter",
    }
    assert manifest.base.digest == base_digest(tiny_llama)
    assert read_manifest(tmp_path / "b") == manifest
    assert (
        load_adapter(tmp_path / "b" / "adapters" / "sport").digest == load_adapter(adapter).digest
    )


def test_the_same_export_gives_the_same_bytes(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama)
    export(tiny_llama, tmp_path / "first", adapters={"sport": adapter})
    code = "import sys; from loradeploy.export.api import export; export(*sys.argv[1:3], "
    code += "adapters={'sport': sys.argv[3]})"
    subprocess.run(
        [sys.executable, "-c", code, tiny_llama, tmp_path / "second", adapter],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        timeout=300,
    )
    files = [f.relative_to(tmp_path / "first") for f in (tmp_path / "first").rglob("*.*")]
    assert len(files) > 8
    for file in files:
        first, second = tmp_path / "first" / file, tmp_path / "second" / file
        assert first.is_dir() or first.read_bytes() == second.read_bytes(), file


def test_a_tokenizer_without_a_tokenizer_json_is_converted(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_llama_bundle, tmp_path / "old")
    kept = json.loads((bundle / "tokenizer.json").read_text())
    (bundle / "tokenizer.json").unlink()
    config = {"tokenizer_class": "GPT2Tokenizer"}
    (bundle / "tokenizer_config.json").write_text(json.dumps(config))
    (bundle / "vocab.json").write_text(json.dumps(kept["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in kept["model"]["merges"])
    (bundle / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    export(bundle, tmp_path / "new")
    made = json.loads((tmp_path / "new" / "tokenizer.json").read_text())
    assert made["model"]["vocab"] == kept["model"]["vocab"]


def test_genai_config_describes_the_graph(tiny_llama_bundle: Path) -> None:
    decoder = json.loads((tiny_llama_bundle / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["head_size"] == 16
    assert decoder["num_key_value_heads"] == 2
    assert decoder["num_hidden_layers"] == 2
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key"


def test_a_side_input_bundle_is_merged_without_its_checkpoint(
    decoder: tuple[Path, Path], ids: Ids, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, bundle = decoder
    adapter = make_adapter(model)
    manifest = export(bundle, tmp_path / "merged", adapters=[adapter], merge=True)
    expected = torch_output(model, ids, adapter=adapter)
    assert difference(onnx_output(tmp_path / "merged", ids), expected) <= tolerance(
        "torch-onnx-tiny"
    )
    assert manifest.base == read_manifest(bundle).base


def test_an_onnx_file_of_the_base_gets_side_inputs(
    tiny_llama: Path, ids: Ids, make_adapter: MakeAdapter, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    import onnx_ir as ir

    from loradeploy.export.passes.side_inputs.inject import remove_side_inputs

    graph = ir.load(tiny_llama_bundle / "model.onnx")
    remove_side_inputs(graph, read_manifest(tiny_llama_bundle))
    (tmp_path / "plain").mkdir()
    ir.save(graph, tmp_path / "plain" / "decoder.onnx", external_data="decoder.onnx.data")
    adapter = make_adapter(tiny_llama)
    manifest = export(tmp_path / "plain" / "decoder.onnx", tmp_path / "b")
    assert manifest.base.kind == "onnx"
    assert manifest.task == "causal-lm"
    side = factors(tmp_path / "b", adapter)
    expected = torch_output(tiny_llama, ids, adapter=adapter)
    assert difference(onnx_output(tmp_path / "b", ids, side=side), expected) <= tolerance(
        "torch-onnx-tiny"
    )
