"""Sentence vectors, according to sentence-transformers' files of the base and of adapters."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from loradeploy.errors import BundleError, LoraDeployError, RunError, UsageError
from loradeploy.export.api import export
from loradeploy.runtime.held import HeldAdapters
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.embedding import TextEmbedder
from loradeploy.runtime.text.sides import TextSides
from tests.conftest import MakeAdapter, once
from tests.inputs.edits import edited_json
from tests.inputs.sentence import write
from tests.runtime.test_run_command import run
from tests.tolerances import tolerance

TEXTS = ["The Bank", "Shares fell in early trading on Thursday", "A bank"]
CLS = ("Pooling", "1_Pooling", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
LAST = ("Pooling", "1_Pooling", {"pooling_mode": "lasttoken", "include_prompt": False})
NORMALIZE = ("Normalize", "2_Normalize", None)
PROMPTS = {"prompts": {"query": "Find: ", "none": ""}, "default_prompt_name": "query"}


def _projection() -> torch.nn.Linear:
    torch.manual_seed(3)
    return torch.nn.Linear(48, 48)


@pytest.fixture(scope="session")
def sentence_base(tiny_bert: Path, shared: Path) -> Path:
    """The tiny BERT as a sentence encoder: normalized first token state, at most 6 tokens."""

    def make(place: Path) -> None:
        shutil.copytree(tiny_bert, place)
        settings = {"max_seq_length": 6, "do_lower_case": False}
        write(place, CLS, NORMALIZE, sentence_bert_config=settings)

    return once(shared / "sentence-bert", make)


@pytest.fixture(scope="session")
def sentence_adapters(
    tiny_bert: Path, sentence_base: Path, shared: Path, make_adapter: MakeAdapter
) -> dict[str, Path]:
    """One adapter without such files, and one that was trained with another pooling."""

    def make(place: Path) -> None:
        for seed, name in enumerate(("plain", "other")):
            make_adapter(
                tiny_bert,
                out=place / name,
                seed=seed,
                task="feature-extraction",
                target_modules=["query", "value"],
            )
        dense = {"in_features": 48, "out_features": 48}
        settings = {"max_seq_length": 9, "do_lower_case": True}
        write(
            place / "other",
            LAST,
            ("Dense", "2_Dense", dense),
            sentence_bert_config=settings,
            config_sentence_transformers=PROMPTS,
        )
        layer = _projection()
        tensors = {"linear.weight": layer.weight.data, "linear.bias": layer.bias.data}
        save_file(tensors, place / "other" / "2_Dense" / "model.safetensors")

    place = once(shared / "sentence-adapters", make)
    return {name: place / name for name in ("plain", "other")}


@pytest.fixture(scope="session")
def sentence_bundle(sentence_base: Path, sentence_adapters: dict[str, Path], shared: Path) -> Path:
    """A bundle of the sentence encoder with both adapters."""

    def make(place: Path) -> None:
        export(sentence_base, place, adapters=sentence_adapters, task="feature-extraction")

    return once(shared / "bundle-sentence", make)


@pytest.fixture(scope="session")
def expected(
    tiny_bert: Path, sentence_adapters: dict[str, Path]
) -> Callable[[str, str | None, str], Any]:
    """A function (text, adapter, prompt) → the vector computed by PyTorch."""
    words = AutoTokenizer.from_pretrained(tiny_bert)
    models = {
        name: peft.PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_bert), place).eval()
        for name, place in sentence_adapters.items()
    }
    models[None] = AutoModel.from_pretrained(tiny_bert).eval()  # type: ignore[index]

    def vector(text: str, adapter: str | None, prompt: str) -> Any:
        own = adapter == "other"
        text = (prompt + text).lower() if own else text
        ids = words(text, return_tensors="pt", truncation=True, max_length=9 if own else 6)
        with torch.no_grad():
            states = models[adapter](input_ids=ids["input_ids"]).last_hidden_state[0]  # type: ignore[index]
            if own:
                return torch.tanh(_projection()(states[-1])).numpy()
            return torch.nn.functional.normalize(states[0], dim=0).numpy()

    return vector


def test_each_text_is_embedded_with_the_settings_of_its_adapter(
    sentence_bundle: Path, expected: Callable[[str, str | None, str], Any]
) -> None:
    embed = TextEmbedder(AdapterSession(sentence_bundle))
    names = [None, "plain", "other"]
    for text in TEXTS:
        vectors = embed([text, text, text], names)
        for name, vector in zip(names, vectors, strict=True):
            error = np.abs(vector - expected(text, name, "Find: ")).max()
            assert error <= tolerance("torch-onnx-tiny"), (text, name)
        assert np.abs(vectors[0] - vectors[1]).max() > 1e-2


def test_a_vector_does_not_depend_on_the_rest_of_the_batch(sentence_bundle: Path) -> None:
    embed = TextEmbedder(AdapterSession(sentence_bundle))
    for name in (None, "other"):
        together = embed(TEXTS, name)
        alone = np.concatenate([embed(text, name) for text in TEXTS])
        assert np.abs(together - alone).max() <= tolerance("rows")


def test_a_prompt_is_selected_by_name(
    sentence_bundle: Path, expected: Callable[[str, str | None, str], Any]
) -> None:
    embed = TextEmbedder(AdapterSession(sentence_bundle))
    (vector,) = embed(TEXTS[0], "other", prompt_name="none")
    error = np.abs(vector - expected(TEXTS[0], "other", "")).max()
    assert error <= tolerance("torch-onnx-tiny")
    with pytest.raises(UsageError, match="no prompt is named 'title'; there are: query, none"):
        embed(TEXTS[0], "other", prompt_name="title")
    with pytest.raises(UsageError, match="no prompt is named 'query'; there are: none"):
        embed(TEXTS[0], prompt_name="query")


def test_the_command_embeds_like_the_class(sentence_bundle: Path) -> None:
    embed = TextEmbedder(AdapterSession(sentence_bundle))
    for flags, options in (((), {}), (("--prompt-name", "none"), {"prompt_name": "none"})):
        result = run(sentence_bundle, TEXTS[0], "--adapter", "other", *flags)
        assert result.exit_code == 0
        (vector,) = embed(TEXTS[0], "other", **options)  # type: ignore[arg-type]
        np.testing.assert_allclose(json.loads(result.stdout), vector, atol=1e-6)


def test_an_adapter_loaded_later_has_its_own_settings_too(
    sentence_bundle: Path, sentence_adapters: dict[str, Path]
) -> None:
    session = AdapterSession(sentence_bundle)
    embed = TextEmbedder(session)
    session.load("later", sentence_adapters["other"])
    session.register("lazy", sentence_adapters["other"])
    vectors = embed([TEXTS[1]] * 3, ["other", "later", "lazy"])
    assert (vectors[1:] == vectors[0]).all()
    session.load("later", sentence_adapters["plain"], replace=True)
    assert (embed(TEXTS[1], "later") == embed(TEXTS[1], "plain")).all()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_texts_whose_adapter_is_replaced_during_the_call_are_tokenized_again_in_order(
    batch_size: int,
    sentence_bundle: Path,
    sentence_adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = AdapterSession(sentence_bundle)
    embed = TextEmbedder(session)
    session.load("x", sentence_adapters["plain"])
    texts = [*TEXTS, *TEXTS]
    names = ["x", None, "x", "x", "plain", "x"]
    right, calls = TextSides.of, []

    def of(self: TextSides, spec: Any) -> Any:
        side = right(self, spec)
        calls.extend(["x"] * (spec == "x"))
        if len(calls) == 2:  # after its text files were read, before its factors are in use
            calls.append("replaced")
            session.load("x", sentence_adapters["other"], replace=True)
        return side

    monkeypatch.setattr(TextSides, "of", of)
    vectors = embed(texts, names, batch_size=batch_size)
    monkeypatch.undo()
    assert "replaced" in calls
    now = ["other" if name == "x" else name for name in names]
    alone = [embed(text, name)[0] for text, name in zip(texts, now, strict=True)]
    assert np.abs(vectors - np.stack(alone)).max() <= tolerance("rows")
    assert np.abs(alone[0] - embed(texts[0], "plain")[0]).max() > 1e-2


def test_a_maximum_length_beyond_the_models_positions_is_limited_to_them(
    sentence_bundle: Path, tmp_path: Path, sentence_adapters: dict[str, Path]
) -> None:
    adapter = shutil.copytree(sentence_adapters["other"], tmp_path / "a")
    (adapter / "sentence_bert_config.json").write_text('{"max_seq_length": 4096}')
    session = AdapterSession(sentence_bundle)
    session.load("long", adapter)
    assert np.isfinite(TextEmbedder(session)("word " * 500, "long")).all()


def test_states_that_are_not_finite_are_refused_except_at_padding(
    sentence_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = TextEmbedder(AdapterSession(sentence_bundle))
    texts = ["one two three", "one"]
    right, place = HeldAdapters.run, [-1]

    def run(self: HeldAdapters, names: Any, feeds: Any) -> Any:
        (states,) = right(self, names, feeds)  # [batch, sequence, hidden]
        states[1, place[0], 0] = np.inf
        return [states]

    expected = embed(texts)
    monkeypatch.setattr(HeldAdapters, "run", run)
    assert np.array_equal(embed(texts), expected)
    place[0] = 0
    with pytest.raises(RunError, match="text 2: the graph gave numbers that are not finite"):
        embed(texts)


def test_vectors_of_several_sizes_are_refused(
    sentence_bundle: Path, tmp_path: Path, sentence_adapters: dict[str, Path]
) -> None:
    adapter = shutil.copytree(sentence_adapters["other"], tmp_path / "a")
    save_file(
        {"linear.weight": torch.zeros(5, 48), "linear.bias": torch.zeros(5)},
        adapter / "2_Dense" / "model.safetensors",
    )
    session = AdapterSession(sentence_bundle)
    session.load("small", adapter)
    with pytest.raises(UsageError, match=r"vectors of sizes \[5, 48\]"):
        TextEmbedder(session)(TEXTS[:2], ["small", None])


@pytest.mark.parametrize("file", ["1_Pooling/config.json", "adapters/other/modules.json"])
def test_a_file_that_changed_since_the_export_is_refused(
    file: str, sentence_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(sentence_bundle, tmp_path / "b")
    (bundle / file).write_text((bundle / file).read_text() + "\n")
    with pytest.raises(BundleError, match="is not the file that came with the bundle"):
        TextEmbedder(AdapterSession(bundle))(TEXTS[0], "other")


def test_a_merged_bundle_embeds_like_its_adapter(
    sentence_bundle: Path, sentence_base: Path, sentence_adapters: dict[str, Path], tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    export(sentence_bundle, merged, adapters={"other": sentence_adapters["other"]}, merge=True)
    found = TextEmbedder(AdapterSession(merged))(TEXTS)
    wanted = TextEmbedder(AdapterSession(sentence_bundle))(TEXTS, "other")
    assert np.abs(found - wanted).max() <= tolerance("torch-onnx-tiny")


def test_an_encoder_in_a_subdirectory_is_supported(
    sentence_base: Path, sentence_bundle: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(sentence_base, tmp_path / "m" / "0_Transformer")
    for name in ("modules.json", "1_Pooling"):
        shutil.move(place / name, tmp_path / "m" / name)
    with edited_json(tmp_path / "m" / "modules.json") as modules:
        modules[0]["path"] = "0_Transformer"
    export(tmp_path / "m", tmp_path / "b", task="feature-extraction")
    both = [TextEmbedder(AdapterSession(b))(TEXTS) for b in (tmp_path / "b", sentence_bundle)]
    assert np.abs(both[0] - both[1]).max() <= tolerance("torch-onnx-tiny")


def test_a_decoder_with_a_pooling_file_is_an_embedder(tiny_llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "m")
    write(base, ("Pooling", "1_Pooling", {"pooling_mode": "lasttoken"}), NORMALIZE)
    assert export(base, tmp_path / "b").task == "feature-extraction"
    vectors = TextEmbedder(AdapterSession(tmp_path / "b"))(TEXTS)
    words, model = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base).eval()
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            last = model(**words(text, return_tensors="pt")).last_hidden_state[0, -1]
        expected = torch.nn.functional.normalize(last, dim=0).numpy()
        assert np.abs(vector - expected).max() <= tolerance("torch-onnx-tiny")


def test_the_default_pooling_is_logged_once(
    sentence_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        export(sentence_bundle, tmp_path / "told")
    default = "is the mean of its tokens' states, scaled to length 1"
    assert not [record for record in caplog.records if default in record.message]
    (tmp_path / "told" / "modules.json").unlink()
    with caplog.at_level(logging.WARNING):
        export(tmp_path / "told", tmp_path / "b")
    assert len([record for record in caplog.records if default in record.message]) == 1


def test_a_module_of_an_unknown_kind_is_refused_at_export(
    sentence_base: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(sentence_base, tmp_path / "m")
    write(place, ("somebody.Pooler", "1_P", None))
    with pytest.raises(LoraDeployError, match=r"somebody\.Pooler, which is code of its own"):
        export(place, tmp_path / "b", task="feature-extraction")
    assert not (tmp_path / "b").exists()
