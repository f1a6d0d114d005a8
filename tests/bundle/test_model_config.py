"""The maximum number of tokens according to a model's config."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import loradeploy as ld
from loradeploy.bundle.model_config import (
    FROM_PADDING_ON,
    context_length,
    rotary_limit,
    stated_length,
)
from loradeploy.errors import UsageError
from tests.export.reference import difference, session, token_feeds

_LONG: Final = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"rope_parameters": {**_LONG, "original_max_position_embeddings": 8}}, 8),
        ({"rope_parameters": _LONG, "original_max_position_embeddings": 8}, 8),
        ({"rope_parameters": _LONG, "original_max_position_embeddings": 8.0}, 8),
        ({"rope_scaling": {**_LONG, "rope_type": "su", "original_max_position_embeddings": 8}}, 8),
        (
            {
                "rope_scaling": {k: v for k, v in _LONG.items() if k != "rope_type"}
                | {"type": "longrope"},
                "original_max_position_embeddings": 8,
            },
            8,
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {**_LONG, "original_max_position_embeddings": 8}
                }
            },
            8,
        ),
        (
            {
                "rope_parameters": {**_LONG, "long_factor": [1.0] * 4},
                "original_max_position_embeddings": 8,
            },
            None,
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 8}},
            None,
        ),
        ({"rope_parameters": _LONG}, None),
        ({"rope_parameters": _LONG, "model_type": "phi3"}, 4096),
        (
            {
                "rope_scaling": {**_LONG, "original_max_position_embeddings": 32},
                "original_max_position_embeddings": 8,
            },
            8,
        ),
        ({}, None),
    ],
)
def test_texts_are_limited_to_the_length_at_which_rotary_frequencies_change(
    config: dict[str, Any], limit: int | None
) -> None:
    config = {"max_position_embeddings": 64, **config}
    for given in (config, {"text_config": config}):
        assert rotary_limit(given) == limit
        assert stated_length(given) == 64
        assert context_length(given) == min(limit or 64, 64)


_YARN: Final = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 16, "rope_scaling": _YARN}, 64),
        ({"max_position_embeddings": 16, "rope_scaling": {"type": "yarn", "factor": 2}}, 32),
        ({"max_position_embeddings": 24, "rope_parameters": _YARN}, 64),
        ({"max_position_embeddings": 64, "rope_parameters": _YARN}, 64),
        ({"max_position_embeddings": 99, "rope_parameters": _YARN}, 99),
        ({"max_position_embeddings": 16, "rope_scaling": {"type": "yarn", "factor": "4"}}, 16),
        ({"max_position_embeddings": 16, "rope_scaling": {**_YARN, "factor": 10**400}}, 16),
        ({"max_position_embeddings": 16, "rope_scaling": {**_YARN, "factor": 1e308}}, 16),
        # Whether its maximum is that before or after scaling differs between models.
        ({"max_position_embeddings": 16, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16),
    ],
)
def test_yarn_extends_the_original_length_by_its_factor(
    config: dict[str, Any], length: int
) -> None:
    for given in (config, {"text_config": config}):
        assert context_length(given) == stated_length(given) == length


@pytest.mark.parametrize("model_type", FROM_PADDING_ON)
def test_positions_before_the_padding_token_are_not_counted(model_type: str) -> None:
    special = {"xmod": {"languages": ["en"], "default_language": "en"}}
    config = AutoConfig.for_model(
        model_type,
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=10,
        pad_token_id=1,
        **special.get(model_type, {}),
    )
    model = AutoModel.from_config(config).eval()
    most = stated_length(config.to_dict())
    assert most == 8
    with torch.no_grad():
        model(torch.full((1, most), 7))
        with pytest.raises((IndexError, RuntimeError), match="out of (range|bounds)"):
            model(torch.full((1, most + 1), 7))


def exported(architecture: Any, config: Any, tokenizer: Path, place: Path) -> Any:
    """Export a random model with the tokenizer of another to `place`/bundle, and return it."""
    torch.manual_seed(0)
    model = architecture(config).eval()
    model.save_pretrained(place / "base")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(place / "base")
    ld.export(place / "base", place / "bundle")
    return model


def test_a_text_beyond_the_original_length_of_yarn_is_that_of_transformers(
    tiny_llama: Path, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
        rope_parameters={**_YARN, "rope_theta": 1e4},
        initializer_range=0.2,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = exported(LlamaForCausalLM, config, tiny_llama, tmp_path)
    generator = ld.TextGenerator(ld.AdapterSession(tmp_path / "bundle"))
    ids = list(range(3, 43))
    with torch.inference_mode():
        made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)
    (result,) = generator.generate([ids], max_new_tokens=8)
    assert list(result.token_ids) == made[0, 40:].tolist()[: len(result.token_ids)]
    with pytest.raises(UsageError, match="has 65 tokens, the model has 64 positions"):
        generator.score([list(range(3, 68))])


def test_text_generation_stops_before_rotary_frequencies_change_and_logs_it(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Phi-3's keys of earlier tokens change once a text is longer than the original length."""
    config = Phi3Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=8,
        rope_parameters={**_LONG, "rope_theta": 1e4},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with caplog.at_level(logging.WARNING, logger="loradeploy.export"):
        model = exported(Phi3ForCausalLM, config, tiny_llama, tmp_path)
    assert any("texts may have up to 8 tokens" in text for text in caplog.messages)
    assert json.loads((tmp_path / "bundle/config.json").read_text())["max_position_embeddings"] == 8
    opened, graph = ld.AdapterSession(tmp_path / "bundle"), session(tmp_path / "bundle")
    ids = np.arange(3, 12)[None]
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids[:, :8])).logits.numpy()
    (logits,) = opened.run(["logits"], token_feeds(graph, ids[:, :8]))
    assert difference(logits, expected) < 1e-5
    with pytest.raises(UsageError, match="position_ids"):
        opened.run(["logits"], token_feeds(graph, ids))
