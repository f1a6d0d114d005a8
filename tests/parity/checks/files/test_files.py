"""A bundle whose tokenizer, pooling or labels are not the model's fails, whatever its numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.adapter.files.tensors import read_arrays, write_arrays
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import BundleError
from loradeploy.parity.checks.files.bundle import differing_files
from loradeploy.parity.context import CheckContext, find_adapters
from loradeploy.parity.inputs.tokens import Cases
from loradeploy.parity.reference.loading import load_model
from tests.conftest import MakeAdapter, once
from tests.inputs import sentence

Change = Callable[[Path], None]


def found(bundle: Path, model: Path, adapters: dict[str, Path] | None = None) -> dict[str, str]:
    """Return the aspects in which files differ, with the messages."""
    manifest = read_manifest(bundle)
    context = CheckContext(
        bundle=bundle,
        manifest=manifest,
        model=model,
        adapters=find_adapters(bundle, manifest, adapters),
        cases=Cases(((1,),), 0, 0, ""),
        scratch=bundle,
    )
    results = differing_files(context, load_model(context))
    assert all(result.outcome == "failed" for result in results)
    return {str(result.aspect): str(result.message) for result in results}


def edited(file: str, **values: Any) -> Change:
    """Set `values` in a JSON file of the bundle, inside the objects that dots in the names name."""

    def change(bundle: Path) -> None:
        whole = json.loads((bundle / file).read_text(encoding="utf-8"))
        for name, value in values.items():
            *path, last = name.split("__")
            inner = whole
            for part in path:
                inner = inner[int(part) if isinstance(inner, list) else part]
            inner[last] = value
        (bundle / file).write_text(json.dumps(whole), encoding="utf-8")

    return change


def exchange_words(bundle: Path) -> None:
    file = bundle / "tokenizer.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    words = whole["model"]["vocab"]
    words["S"], words["T"] = words["T"], words["S"]
    file.write_text(json.dumps(whole), encoding="utf-8")


def change_template(bundle: Path) -> None:
    file = bundle / "chat_template.jinja"
    file.write_text(file.read_text(encoding="utf-8").replace("assistant", "bot"), encoding="utf-8")


@pytest.mark.parametrize(
    ("aspect", "change"),
    [
        ("tokenizer", exchange_words),
        ("tokenizer", edited("tokenizer.json", model__merges=[])),
        ("tokenizer", edited("tokenizer.json", pre_tokenizer__add_prefix_space=True)),
        ("tokenizer", edited("tokenizer_config.json", pad_token="<|im_end|>")),
        ("tokenizer", edited("tokenizer.json", added_tokens__1__lstrip=True)),
        ("tokenizer", edited("tokenizer.json", model__fuse_unk=True)),
        ("tokenizer", lambda bundle: (bundle / "tokenizer.json").unlink()),
        ("chat template", change_template),
        ("tokenizer", edited("tokenizer_config.json", truncation_side="left")),
        ("tokenizer", edited("tokenizer_config.json", model_input_names=["token_type_ids"])),
        ("precision", edited("loradeploy.json", precision="fp16")),
        ("precision", edited("loradeploy.json", precision="int4")),
        ("positions", edited("config.json", max_position_embeddings=4096)),
        ("positions", edited("tokenizer_config.json", model_max_length=7)),
        ("end tokens", edited("generation_config.json", eos_token_id=5)),
        ("generation", edited("generation_config.json", repetition_penalty=1.3)),
        ("generation", edited("generation_config.json", no_repeat_ngram_size=2)),
        ("generation", edited("generation_config.json", suppress_tokens=[5, 6])),
        ("generation", edited("generation_config.json", begin_suppress_tokens=[5])),
        ("generation", edited("generation_config.json", bad_words_ids=[[5, 6]])),
        ("generation", edited("generation_config.json", forced_eos_token_id=2)),
        ("generation", edited("generation_config.json", min_new_tokens=3)),
        ("generation", edited("generation_config.json", min_length=30)),
        ("generation", edited("generation_config.json", stop_strings=["."])),
        ("generation", edited("generation_config.json", length_penalty=2.0)),
        ("padding", edited("loradeploy.json", padding="right")),
        ("padding", edited("loradeploy.json", padding="none")),
        ("genai config", edited("genai_config.json", model__eos_token_id=5)),
        ("genai config", edited("genai_config.json", model__decoder__head_size=8)),
        ("config", edited("config.json", image_token_id=7)),
        ("config", edited("config.json", model_type="another")),
        ("manifest", edited("loradeploy.json", traced=False)),
        ("manifest", edited("loradeploy.json", whole_prompts=True)),
        ("manifest", edited("loradeploy.json", own_weights={})),
        ("manifest", edited("loradeploy.json", opset=21)),
        ("manifest", edited("loradeploy.json", cache_in_place=True)),
        ("manifest", edited("loradeploy.json", fixed_ranges=1)),
        ("manifest", edited("loradeploy.json", base_prefix="model")),
        ("manifest", edited("loradeploy.json", inputs__0__shape=["batch", 4])),
        ("adapters", edited("loradeploy.json", adapters={})),
        ("files", lambda bundle: (bundle / "adapters/one.onnx_adapter").unlink()),
    ],
)
def test_a_decoder_whose_texts_are_read_otherwise_is_found(
    aspect: str, change: Change, tiny_llama: Path, llama_bundle: Path
) -> None:
    assert found(llama_bundle, tiny_llama) == {}
    change(llama_bundle)
    assert list(found(llama_bundle, tiny_llama)) == [aspect]


@pytest.mark.parametrize("setting", [{"temperature": 0.2}, {"top_k": 3}, {"max_new_tokens": 5}])
def test_settings_that_no_text_follows_unasked_may_be_changed(
    setting: dict[str, Any], tiny_llama: Path, llama_bundle: Path
) -> None:
    edited("generation_config.json", **setting)(llama_bundle)
    edited("genai_config.json", search__temperature=0.2)(llama_bundle)
    assert found(llama_bundle, tiny_llama) == {}


def test_the_side_of_padding_is_that_of_the_graph(
    tiny_llama: Path, llama_in_form: Callable[..., Path]
) -> None:
    bundle = llama_in_form("gqa-files", attention="gqa")
    assert found(bundle, tiny_llama) == {}, "GroupQueryAttention counts from the right"
    edited("loradeploy.json", padding="left")(bundle)
    assert "padding is left, and model.onnx is padded right" in found(bundle, tiny_llama)["padding"]


def test_the_batches_of_an_encoder_may_be_padded(
    tiny_bert: Path, tiny_bert_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bert_bundle, tmp_path / "bundle"))
    edited("loradeploy.json", padding="none")(bundle)
    assert list(found(bundle, tiny_bert)) == ["padding"]


@pytest.mark.parametrize(
    ("aspect", "change"),
    [
        ("generation", edited("generation_config.json", suppress_tokens=[])),
        ("generation", edited("generation_config.json", begin_suppress_tokens=[])),
        ("generation", edited("generation_config.json", return_timestamps=True)),
        ("generation", edited("generation_config.json", language="<|de|>")),
        ("generation", edited("generation_config.json", lang_to_id={"<|en|>": 515})),
        ("generation", edited("generation_config.json", forced_decoder_ids=[[1, 514]])),
        ("generation", edited("generation_config.json", max_initial_timestamp_index=3)),
        ("generation", edited("generation_config.json", max_length=9)),
        ("start token", edited("generation_config.json", decoder_start_token_id=5)),
        ("audio features", edited("preprocessor_config.json", hop_length=80)),
        ("audio features", edited("preprocessor_config.json", padding_value=0.5)),
    ],
)
def test_a_model_of_speech_that_hears_or_writes_otherwise_is_found(
    aspect: str, change: Change, tiny_whisper: Path, whisper: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(whisper, tmp_path / "bundle"))
    change(bundle)
    assert list(found(bundle, tiny_whisper)) == [aspect]


@pytest.fixture(scope="module")
def whisper(tiny_whisper: Path, shared: Path) -> Path:
    bundle = once(shared / "bundle-whisper-files", lambda place: ld.export(tiny_whisper, place))
    assert found(bundle, tiny_whisper) == {}
    return bundle


def test_the_precision_of_an_encoder_decoder_is_that_of_one_of_its_graphs(
    tiny_t5: Path, shared: Path, tmp_path: Path
) -> None:
    made = once(shared / "bundle-t5-files", lambda place: ld.export(tiny_t5, place))
    bundle = Path(shutil.copytree(made, tmp_path / "bundle"))
    edited("loradeploy.json", precision="fp16")(bundle)
    assert "has weights in fp32" in found(bundle, tiny_t5)["precision"]
    ld.export(tiny_t5, tmp_path / "half", precision="fp16")
    for file in (tmp_path / "half").glob("encoder.onnx*"):
        shutil.copy(file, bundle)
    assert "precision" not in found(bundle, tiny_t5)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_another_start_token_of_an_encoder_decoder_is_found(
    file: str, tiny_t5: Path, shared: Path, tmp_path: Path
) -> None:
    made = once(shared / "bundle-t5-files", lambda place: ld.export(tiny_t5, place))
    bundle = Path(shutil.copytree(made, tmp_path / "bundle"))
    model = Path(shutil.copytree(tiny_t5, tmp_path / "model"))
    for place in (bundle, model):
        (place / "generation_config.json").write_text('{"eos_token_id": 1}')
    edited("config.json", decoder_start_token_id=0)(bundle)
    edited("config.json", decoder_start_token_id=0)(model)
    assert found(bundle, model) == {}
    edited(file, decoder_start_token_id=5)(bundle)
    assert "begins a text is 5, expected 0" in found(bundle, model)["start token"]


def test_the_report_fails_with_the_aspect(tiny_llama: Path, llama_bundle: Path) -> None:
    options: dict[str, Any] = {
        "model": tiny_llama, "prompts": ["Hi"], "tokens": 2, "backends": ["onnx-side-inputs"],
    }  # fmt: skip
    assert ld.parity(llama_bundle, **options).passed
    change_template(llama_bundle)
    report = ld.parity(llama_bundle, **options)
    assert [result.aspect for result in report.results if result.outcome == "failed"] == [
        "chat template"
    ]
    assert "files of the bundle, chat template: the chat template is not" in report.failures[0]


@pytest.fixture(scope="module")
def embedder(tiny_bert: Path, shared: Path) -> tuple[Path, Path]:
    """The tiny BERT with sentence-transformers' files, and its bundle."""

    def make(place: Path) -> None:
        shutil.copytree(tiny_bert, place / "model")
        sentence.write(
            place / "model",
            ("Pooling", "1_Pooling", {"pooling_mode_mean_tokens": True}),
            ("Normalize", "2_Normalize", None),
        )
        ld.export(place / "model", place / "bundle", task="feature-extraction")

    place = once(shared / "embedder-with-pooling", make)
    return place / "model", place / "bundle"


def cut_normalization(bundle: Path) -> None:
    file = bundle / "modules.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:2]))


@pytest.mark.parametrize(
    "change",
    [
        cut_normalization,
        edited(
            "1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True
        ),
        lambda bundle: (bundle / "modules.json").unlink(),
    ],
    ids=["no normalization", "another pooling", "no pooling"],
)
def test_an_embedder_whose_vectors_are_made_otherwise_is_found(
    change: Change, embedder: tuple[Path, Path], tmp_path: Path
) -> None:
    model, bundle = embedder
    assert found(bundle, model) == {}
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    change(copy)
    assert list(found(copy, model)) == ["pooling"]


def test_labels_are_those_of_the_model_or_of_an_adapter(
    tiny_bert: Path, tiny_bert_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bert_bundle, tmp_path / "bundle"))
    assert found(bundle, tiny_bert) == {}
    edited("config.json", id2label={"0": "LABEL_1", "1": "LABEL_0"})(bundle)
    assert "the labels are ('LABEL_1', 'LABEL_0')" in found(bundle, tiny_bert)["labels"]
    edited("config.json", id2label={"0": "sport", "1": "tech"})(bundle)
    assert list(found(bundle, tiny_bert)) == ["labels"]
    edited("config.json", id2label={"sport": 0})(bundle)
    assert "the keys of id2label are not numbers" in found(bundle, tiny_bert)["labels"]


def test_names_of_labels_that_are_lost_are_found(
    tiny_bert: Path, tiny_bert_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bert_bundle, tmp_path / "bundle"))
    model = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    edited("config.json", id2label=None)(bundle)
    assert found(bundle, tiny_bert) == {}, "its names are LABEL_0 and LABEL_1 anyway"
    edited("config.json", id2label={"0": "sport", "1": "tech"})(model)
    assert list(found(bundle, model)) == ["labels"]


def test_another_problem_type_is_found(
    tiny_bert: Path, tiny_bert_bundle: Path, bert_heads: dict[str, Path], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bert_bundle, tmp_path / "bundle"))
    edited("loradeploy.json", problem_type="multi_label_classification")(bundle)
    message = "the problem_type is 'multi_label_classification', expected 'single_label"
    assert message in found(bundle, tiny_bert)["problem type"]
    merged = tmp_path / "merged"
    ld.export(tiny_bert, merged, adapters=[bert_heads["own"]], merge=True)
    assert found(merged, tiny_bert, bert_heads) == {}
    edited("loradeploy.json", problem_type="regression")(merged)
    assert list(found(merged, tiny_bert, bert_heads)) == ["problem type"]


def test_the_positions_of_a_model_with_two_kinds_of_rotary_frequencies_are_the_fewer_ones(
    tiny_llama: Path, llama_bundle: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    scaling = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    }  # fmt: skip
    edited("config.json", rope_parameters=scaling)(model)
    edited("config.json", rope_parameters=scaling, max_position_embeddings=64)(llama_bundle)
    for place in (model, llama_bundle):
        edited("tokenizer_config.json", model_max_length=None)(place)
    edited("genai_config.json", model__context_length=64)(llama_bundle)
    assert found(llama_bundle, model) == {}
    edited("config.json", max_position_embeddings=32)(llama_bundle)
    assert list(found(llama_bundle, model)) == ["positions"]


@pytest.fixture(scope="module")
def onnx_sources(tiny_llama: Path, tiny_llama_bundle: Path, shared: Path) -> Callable[[bool], Path]:
    """A function (with the model's files beside it?) → the bundle of an ONNX file."""

    def make(place: Path, complete: bool) -> None:
        import onnx_ir as ir

        from loradeploy.export.passes.side_inputs.inject import remove_side_inputs

        graph = ir.load(tiny_llama_bundle / "model.onnx")
        remove_side_inputs(graph, read_manifest(tiny_llama_bundle))
        source = place / "source"
        source.mkdir(parents=True)
        ir.save(graph, source / "decoder.onnx", external_data="decoder.onnx.data")
        for pattern in ("*.json", "*.jinja") if complete else ():
            for file in tiny_llama.glob(pattern):
                shutil.copy(file, source)
        ld.export(source / "decoder.onnx", place / "bundle")

    def bundle(complete: bool) -> Path:
        name = f"bundle-llama-onnx-{complete}"
        return once(shared / name, lambda place: make(place, complete)) / "bundle"

    return bundle


def test_the_files_of_an_onnx_source_may_be_few(
    onnx_sources: Callable[[bool], Path], tiny_llama: Path
) -> None:
    assert not read_manifest(onnx_sources(False)).traced
    assert found(onnx_sources(False), tiny_llama) == {}, "texts are refused without a tokenizer"


@pytest.mark.parametrize(
    ("aspect", "change"),
    [
        ("tokenizer", exchange_words),
        ("chat template", change_template),
        ("end tokens", edited("generation_config.json", eos_token_id=5)),
        ("generation", edited("generation_config.json", repetition_penalty=1.3)),
        ("positions", edited("tokenizer_config.json", model_max_length=7)),
        ("padding", edited("loradeploy.json", padding="right")),
    ],
)
def test_the_files_of_an_onnx_source_are_compared_with_the_model(
    aspect: str,
    change: Change,
    onnx_sources: Callable[[bool], Path],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    bundle = Path(shutil.copytree(onnx_sources(True), tmp_path / "bundle"))
    assert found(bundle, tiny_llama) == {}
    change(bundle)
    assert list(found(bundle, tiny_llama)) == [aspect]


def set_in_manifest(bundle: Path, *path: str, value: Any) -> None:
    edited("loradeploy.json", **{"__".join(path): value})(bundle)


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_another_problem_type_of_an_adapter_is_found(
    problem: str | None,
    tiny_bert: Path,
    tiny_bert_bundle: Path,
    bert_heads: dict[str, Path],
    tmp_path: Path,
) -> None:
    bundle = tmp_path / "bundle"
    ld.export(tiny_bert_bundle, bundle, adapters=bert_heads)
    assert found(bundle, tiny_bert) == {}
    set_in_manifest(bundle, "adapters", "own", "problem_type", value=problem)
    assert "problem_type" in found(bundle, tiny_bert)["adapters"]
    set_in_manifest(bundle, "adapters", "own", "problem_type", value="single_label_classification")
    set_in_manifest(bundle, "adapters", "own", "labels", value=["sport", "tech"])
    assert "labels are ('sport', 'tech')" in found(bundle, tiny_bert)["adapters"]


@pytest.fixture(scope="module")
def texts(
    tiny_llama_bundle: Path, tiny_llama: Path, make_adapter: MakeAdapter, shared: Path
) -> Path:
    """A bundle of the tiny Llama with the adapters "plain" and "own", which has a template."""

    def make(place: Path) -> None:
        adapters = {"plain": make_adapter(tiny_llama, seed=1), "own": place / "own"}
        make_adapter(tiny_llama, out=place / "own", seed=2)
        (place / "own" / "chat_template.jinja").write_text("{{ messages[0]['content'] }} =>")
        ld.export(tiny_llama_bundle, place / "bundle", adapters=adapters)

    return once(shared / "bundle-llama-texts", make) / "bundle"


def exchange_adapters(bundle: Path) -> None:
    file = bundle / "loradeploy.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    one, two = whole["adapters"]["own"], whole["adapters"]["plain"]
    whole["adapters"] = {"own": two, "plain": one}
    file.write_text(json.dumps(whole), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        exchange_adapters,
        edited("loradeploy.json", adapters__own__text=None),
        lambda bundle: (bundle / "adapters/own/chat_template.jinja").write_text("{{ messages }}"),
        lambda bundle: (bundle / "adapters/own/chat_template.jinja").unlink(),
        lambda bundle: (bundle / "adapters/plain/generation_config.json").write_text(
            '{"eos_token_id": 5}'
        ),
    ],
    ids=["exchanged", "no texts", "another template", "no template", "an added file"],
)
def test_an_adapter_whose_texts_are_read_otherwise_is_found(
    change: Change, texts: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(texts, tmp_path / "bundle"))
    assert found(bundle, tiny_llama) == {}
    change(bundle)
    assert list(found(bundle, tiny_llama)) == ["adapters"]


@pytest.mark.parametrize("field", ["problem_type", "probabilities"])
def test_other_scores_of_a_token_classifier_are_found(
    field: str, tiny_bert: Path, shared: Path, tmp_path: Path
) -> None:
    made = once(
        shared / "bundle-bert-tokens-files",
        lambda place: ld.export(tiny_bert, place, task="token-classification"),
    )
    bundle = Path(shutil.copytree(made, tmp_path / "bundle"))
    assert found(bundle, tiny_bert) == {}
    values = {"problem_type": "multi_label_classification", "probabilities": "logits"}
    set_in_manifest(bundle, field, value=values[field])
    assert list(found(bundle, tiny_bert)) == ["problem type"]


def test_a_merged_bundle_has_the_files_of_its_adapter(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama, out=tmp_path / "own")
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }} =>")
    ld.export(tiny_llama_bundle, tmp_path / "merged", adapters=[adapter], merge=True)
    assert found(tmp_path / "merged", tiny_llama, {"own": adapter}) == {}
    other = make_adapter(tiny_llama)
    assert list(found(tmp_path / "merged", tiny_llama, {"own": other})) == ["chat template"]


@pytest.fixture
def bert_heads(tiny_bert: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    options: dict[str, Any] = {"task": "sequence-classification", "modules_to_save": ["classifier"]}
    return {"own": make_adapter(tiny_bert, **options)}


@pytest.fixture
def with_required_inputs(llama_in_form: Callable[..., Path]) -> Path:
    return llama_in_form("required", required_inputs=True)


def change_epsilon(bundle: Path) -> None:
    import onnx

    model = onnx.load(bundle / "required.onnx", load_external_data=False)
    norm = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
    (epsilon,) = (each for each in norm.attribute if each.name == "epsilon")
    epsilon.f = 0.5
    (bundle / "required.onnx").write_bytes(model.SerializeToString())


def change_defaults(bundle: Path) -> None:
    arrays, _ = read_arrays(bundle / "required.safetensors", error=BundleError)
    ranks = {name: np.ones((1, values.shape[1], 1), values.dtype) for name, values in arrays.items()
             if name.endswith("lora_A")}  # fmt: skip
    write_arrays(bundle / "required.safetensors", {**arrays, **ranks}, {})


def change_adapter(bundle: Path) -> None:
    file = bundle / "adapters" / "one.safetensors"
    arrays, _ = read_arrays(file, error=BundleError)
    write_arrays(file, {name: values * 2 for name, values in arrays.items()}, {})


def cut_adapter(bundle: Path) -> None:
    file = bundle / "adapters" / "one.safetensors"
    file.write_bytes(file.read_bytes()[:40])


def test_a_second_graph_with_branches_is_right(
    tiny_llama: Path, llama_in_form: Callable[..., Path]
) -> None:
    bundle = llama_in_form("required-branches", required_inputs=True, branches=True)
    assert found(bundle, tiny_llama) == {}


def test_a_second_graph_in_another_writing_is_the_same(
    tiny_llama: Path, with_required_inputs: Path
) -> None:
    import onnx

    file = with_required_inputs / "required.onnx"
    model = onnx.load(file, load_external_data=False)
    model.producer_version, model.graph.name = "another", "another"
    for node in model.graph.node:
        node.name = f"another {node.name}"
        node.metadata_props.add(key="written", value="by another version")
    file.write_bytes(model.SerializeToString())
    assert found(with_required_inputs, tiny_llama) == {}


@pytest.mark.parametrize("change", [change_epsilon, change_defaults, change_adapter, cut_adapter])
def test_a_second_graph_that_computes_something_else_is_found(
    change: Change, tiny_llama: Path, with_required_inputs: Path
) -> None:
    assert found(with_required_inputs, tiny_llama) == {}
    change(with_required_inputs)
    assert list(found(with_required_inputs, tiny_llama)) == ["required inputs"]


@pytest.fixture(scope="module")
def bert_with_changes(tiny_bert: Path, make_adapter: MakeAdapter, shared: Path) -> Path:
    """A classifier with an adapter that changes biases (DoRA) and brings a head."""
    adapter = make_adapter(
        tiny_bert,
        task="sequence-classification",
        modules_to_save=["classifier"],
        use_dora=True,
    )
    return once(
        shared / "bundle-bert-dora-head",
        lambda place: ld.export(tiny_bert, place, adapters={"own": adapter}),
    )


@pytest.mark.parametrize("file", ["base.safetensors", "defaults.safetensors"])
def test_every_value_of_the_base_beside_the_graph_is_compared(
    file: str, tiny_bert: Path, bert_with_changes: Path, tmp_path: Path
) -> None:
    assert found(bert_with_changes, tiny_bert) == {}
    bundle = Path(shutil.copytree(bert_with_changes, tmp_path / "bundle"))
    arrays, _ = read_arrays(bundle / file, error=BundleError)
    name = sorted(arrays)[-1]
    changed = arrays[name].copy()
    changed.flat[-1] += 0.01
    write_arrays(bundle / file, {**arrays, name: changed}, {})
    assert f"{file}: {name} is not the base's" in found(bundle, tiny_bert)["weights"]
