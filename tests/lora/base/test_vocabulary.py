"""Which parameters of PyTorch models have one row per token."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loradeploy as ld
from loradeploy.adapter import load_adapter
from loradeploy.adapter.fitting.vocabulary import Vocabulary
from loradeploy.errors import AdapterMismatchError, ModelError
from loradeploy.lora.base.vocabulary import vocabulary_of
from loradeploy.lora.inject import load
from tests.export.reference import difference, onnx_output, torch_output
from tests.lora import tiny


def test_an_image_model_without_an_embedding_has_no_vocabulary() -> None:
    assert vocabulary_of(tiny.model("convnext")) is None
    assert vocabulary_of(tiny.model("vit")) is None, "its embedding is of patches"


def test_a_vocabulary_names_the_tables_and_whether_they_are_tied() -> None:
    names = ("model.embed_tokens", "lm_head")
    assert vocabulary_of(tiny.model("llama")) == Vocabulary(64, *names)
    assert vocabulary_of(tiny.model("llama-tied")) == Vocabulary(64, *names, tied=True)


def test_a_text_config_without_tie_word_embeddings_is_untied() -> None:
    small = {"hidden_size": 32, "intermediate_size": 32}
    text = {**small, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    image = {**small, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "vocab_size": 64}, vision_config=image
    )
    assert not hasattr(config.get_text_config(), "tie_word_embeddings")
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    found = vocabulary_of(model)
    assert found == Vocabulary(64, "model.language_model.embed_tokens", "lm_head")


def _with_head_of_its_own(tied: Path, place: Path) -> Path:
    """Copy the checkpoint `tied` with a separate head, which contradicts its config.json."""
    shutil.copytree(tied, place)
    tensors = load_file(place / "model.safetensors")
    tensors["lm_head.weight"] = torch.flip(tensors["transformer.wte.weight"], (0,)).contiguous()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.mark.parametrize("merge", [False, True], ids=["side inputs", "merged"])
def test_rows_of_an_embedding_whose_head_is_tied_only_by_the_config_are_refused(
    merge: bool, tiny_gpt2: Path, tmp_path: Path
) -> None:
    """transformers then has two weights, and PEFT changes the rows of both."""
    base = _with_head_of_its_own(tiny_gpt2, tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    options = peft.LoraConfig(
        r=2, target_modules=["c_attn"], trainable_token_indices=[3, 9], task_type="CAUSAL_LM"
    )
    peft.get_peft_model(model, options).save_pretrained(tmp_path / "a")
    message = "puts into lm_head.weight too, because the base's config.json has tie_word_embeddings"
    with pytest.raises(AdapterMismatchError, match=message):
        ld.export(base, tmp_path / "b", adapters=[tmp_path / "a"], merge=merge)
    untouched = transformers.AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(AdapterMismatchError, match=message):
        load(untouched, load_adapter(tmp_path / "a"))
    load(transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt2), load_adapter(tmp_path / "a"))
    with pytest.raises(ModelError, match="ties transformer.wte.weight and lm_head.weight"):
        ld.export(base, tmp_path / "b", side_inputs=["tokens"])
    whole = ld.export(base, tmp_path / "bundle", side_inputs=["embedding"])
    assert "transformer.wte.weight" not in whole.own_weights
    with pytest.raises(AdapterMismatchError, match="too, because|not known which modules"):
        ld.export(tmp_path / "bundle", tmp_path / "b", adapters=[tmp_path / "a"], merge=merge)
    with pytest.raises(AdapterMismatchError, match="not known which modules"):
        ld.AdapterSession(tmp_path / "bundle").load("a", tmp_path / "a")


@pytest.fixture(scope="module")
def tied_int8(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tied") / "int8"
    ld.export(tiny_gpt2, place, precision="int8")
    return place


def _adapter(model: Any, place: Path, **options: Any) -> Path:
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", **options)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "token_adapter" in name:
                parameter += torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    wrapped.save_pretrained(place, save_embedding_layers="token" not in str(options))
    return place


@pytest.mark.parametrize("brought", ["rows", "a table"])
def test_changes_of_a_tied_embedding_with_a_quantized_head_are_refused(
    brought: str, tied_int8: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    if brought == "a table":
        with torch.no_grad():
            model.transformer.wte.weight[[3, 9]] += 0.5
    options = {"trainable_token_indices": [3, 9]} if brought == "rows" else {}
    adapter = _adapter(model, tmp_path / "a", **options)
    if brought == "a table":
        assert "transformer.wte.weight" in load_adapter(adapter).carried
    with pytest.raises(AdapterMismatchError, match=r"lm_head.* is quantized"):
        ld.export(tied_int8, tmp_path / "b", adapters=[adapter], merge=True, requantize=True)


def test_rows_are_merged_into_every_copy_of_a_tied_weight_in_a_bundle(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    """With side inputs for rows, the head is a separate constant."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    adapter = _adapter(model, tmp_path / "a", trainable_token_indices=[3, 9])
    ld.export(tiny_gpt2, tmp_path / "bundle", side_inputs=["tokens"])
    ids = np.array([[3, 9, 5, 3]])
    results = []
    for name, source in (("checkpoint", tiny_gpt2), ("again", tmp_path / "bundle")):
        ld.export(source, tmp_path / name, adapters=[adapter], merge=True)
        results.append(onnx_output(tmp_path / name, ids))
    assert difference(*results) < 1e-5 < 0.1 < difference(results[0], torch_output(tiny_gpt2, ids))


def test_copies_of_the_embedding_do_not_prevent_a_merge_into_quantized_weights(
    tied_int8: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    adapter = _adapter(model, tmp_path / "a")
    assert load_adapter(adapter).carried
    made = ld.export(tied_int8, tmp_path / "b", adapters=[adapter], merge=True, requantize=True)
    assert made.merged_adapter is not None


def test_rows_of_only_a_tied_head_are_refused(tiny_gpt2: Path, tmp_path: Path) -> None:
    """In PEFT they change only the output, although the embedding has the same weight."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    adapter = _adapter(model, tmp_path / "a", trainable_token_indices={"lm_head": [3, 9]})
    assert [*load_adapter(adapter).rows] == ["lm_head.weight"]
    message = "rows of lm_head.weight were trained .* and none of transformer.wte.weight"
    for merge in (False, True):
        with pytest.raises(AdapterMismatchError, match=message):
            ld.export(tiny_gpt2, tmp_path / "b", adapters=[adapter], merge=merge)
    ld.export(tiny_gpt2, tmp_path / "bundle", side_inputs=["tokens"])
    for merge in (False, True):
        with pytest.raises(AdapterMismatchError, match=message):
            ld.export(tmp_path / "bundle", tmp_path / "b", adapters=[adapter], merge=merge)
    with pytest.raises(AdapterMismatchError, match=message):
        ld.AdapterSession(tmp_path / "bundle").load("a", adapter)
