"""Where models in PyTorch have a row per token."""

from __future__ import annotations

import torch
import transformers

from loradeploy.adapter.fitting.vocabulary import Vocabulary
from loradeploy.lora.base.vocabulary import vocabulary_of
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
