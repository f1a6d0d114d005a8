"""Where models in PyTorch have a row per token."""

from __future__ import annotations

import shutil
from pathlib import Path

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
from tests.lora import tiny


def test_a_model_of_images_without_an_embedding_has_no_vocabulary() -> None:
    assert vocabulary_of(tiny.model("convnext")) is None
    assert vocabulary_of(tiny.model("vit")) is None, "its embedding is of patches"


def test_a_vocabulary_names_the_tables_and_whether_they_are_tied() -> None:
    names = ("model.embed_tokens", "lm_head")
    assert vocabulary_of(tiny.model("llama")) == Vocabulary(64, *names)
    assert vocabulary_of(tiny.model("llama-tied")) == Vocabulary(64, *names, tied=True)


def test_a_text_configuration_that_says_nothing_of_ties_has_none() -> None:
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
    """The checkpoint `tied`, with another head in its file than config.json has it."""
    shutil.copytree(tied, place)
    tensors = load_file(place / "model.safetensors")
    tensors["lm_head.weight"] = torch.flip(tensors["transformer.wte.weight"], (0,)).contiguous()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.mark.parametrize("merge", [False, True], ids=["side inputs", "merged"])
def test_rows_of_an_embedding_whose_head_is_tied_by_the_config_alone_are_refused(
    merge: bool, tiny_gpt2: Path, tmp_path: Path
) -> None:
    """transformers has two weights then, and PEFT puts the rows into both."""
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
