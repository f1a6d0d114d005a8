"""Logits are processed as in transformers, by the generation settings of a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel

from loradeploy.bundle.text.settings import GenerationSettings, read_settings
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import BundleError, UsageError
from loradeploy.runtime.decoding.choosing.options import GenerationOptions
from loradeploy.runtime.decoding.choosing.processors import Processors

VOCABULARY, ENDS = 24, (2,)
PROMPT, MADE = [5, 6, 7, 5, 6], [9, 5]
LIMIT = len(MADE) + 1
MASK = np.isin(np.arange(VOCABULARY), [4, 5, 11])


@pytest.mark.parametrize("made", [[], MADE], ids=["first-token", "later"])
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 3},
        {"suppress_tokens": [3, 4]},
        {"begin_suppress_tokens": [8]},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [1]},
        {"bad_words_ids": [[4], [6, 3], [9, 5, 11]]},
        {"min_length": 9},
        # The last token of a text is forced even if an end token would be too early there.
        {"min_new_tokens": 9, "forced_eos_token_id": 2},
        {"min_length": 30, "bad_words_ids": [[8]], "forced_eos_token_id": [2, 8]},
        {"forced_eos_token_id": [2, 3], "suppress_tokens": [3]},
    ],
    ids=lambda settings: "+".join(settings),
)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_scores_are_those_of_transformers(
    settings: dict[str, Any], made: list[int], masked: bool
) -> None:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    logits = np.random.default_rng(0).standard_normal(VOCABULARY).astype(np.float32) * 3
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    config = LlamaConfig(num_hidden_layers=1, vocab_size=VOCABULARY, **tiny)
    model = LlamaForCausalLM(config)
    values = {"eos_token_id": list(ENDS), "pad_token_id": 0, "num_beams": 1}
    message = GenerationConfig(**settings, **values, max_length=len(PROMPT) + LIMIT)
    message._eos_token_tensor = torch.tensor(ENDS)
    processors = model._get_logits_processor(
        generation_config=message,
        input_ids_seq_length=len(PROMPT),
        encoder_input_ids=torch.tensor([PROMPT]),
        prefix_allowed_tokens_fn=(lambda *_: MASK.nonzero()[0].tolist()) if masked else None,
        logits_processor=[],
        device="cpu",
    )
    ids = torch.tensor([[*PROMPT, *made]])
    expected = processors(ids, torch.from_numpy(logits.copy())[None])[0].numpy()
    mask: dict[str, Any] = {"allowed_tokens": lambda _: MASK} if masked else {}
    process = Processors(read_settings(settings, "s"), ENDS, limit=LIMIT, **mask)
    got = process(logits, PROMPT, made)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_bias_for_a_text_outside_the_vocabulary_is_not_that_of_the_unknown_token(
    tmp_path: Path,
) -> None:
    """T5's tokenizer has no brace and returns its unknown token for it."""
    words = WordLevel({"<unk>": 0, "w1": 1, "w2": 2}, unk_token="<unk>")
    FastTokenizer(words).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>"}))
    tokenizer = Tokenizer(tmp_path)

    def made(text: str) -> Any:
        options = GenerationOptions(logit_bias={text: 3.0})
        return Processors.of(options, GenerationSettings(), tokenizer, ENDS, "prompt 1")

    assert made("w2")(np.zeros(3, np.float32), [1], []).tolist() == [0, 0, 3]
    assert made("<unk>")(np.zeros(3, np.float32), [1], []).tolist() == [3, 0, 0]
    with pytest.raises(
        UsageError, match=r"names the text '\{', which the vocabulary does not have"
    ):
        made("{")


def test_a_prompt_can_have_tokens_beyond_the_logits_of_the_head() -> None:
    logits = np.zeros(VOCABULARY, np.float32)
    settings = GenerationSettings(repetition_penalty=2.0, no_repeat_ngram_size=1)
    changed = Processors(settings, ENDS)(logits, [VOCABULARY + 3, 4], [])
    assert np.flatnonzero(np.isinf(changed)).tolist() == [4]


@pytest.mark.parametrize(
    ("name", "harmless", "telling"),
    [
        ("num_beams", 1, 4),
        ("typical_p", 1.0, 0.9),
        ("dola_layers", None, "high"),
        ("renormalize_logits", False, True),
        ("num_beam_groups", 1, 2),
    ],
)
def test_settings_that_are_not_applied_are_named(name: str, harmless: Any, telling: Any) -> None:
    assert read_settings({name: harmless}, "s") == GenerationSettings()
    message = read_settings({name: telling}, "s")
    assert message == dataclasses.replace(GenerationSettings(), ignored=(name,))


def test_parameters_of_beam_search_can_come_from_the_model() -> None:
    own = read_settings({"length_penalty": 2.0, "early_stopping": True}, "s")
    assert (own.length_penalty, own.early_stopping, own.ignored) == (2.0, True, ())
    assert not own.changes_scores
    for wrong in (
        {"length_penalty": "long"},
        {"length_penalty": 99},
        {"length_penalty": 10**400},
        {"length_penalty": float("nan")},
        {"repetition_penalty": 10**400},
        {"repetition_penalty": float("nan")},
        {"early_stopping": "soon"},
    ):
        with pytest.raises(BundleError, match=f"s: {next(iter(wrong))} is"):
            read_settings(wrong, "s")


def test_a_minimum_of_new_tokens_takes_precedence_over_a_minimum_length() -> None:
    assert read_settings({"min_length": 30}, "s").min_length == 30
    own = read_settings({"min_length": 30, "min_new_tokens": 3}, "s")
    assert (own.min_length, own.min_new_tokens) == (0, 3)


def test_stop_strings_and_min_p_can_come_from_the_model() -> None:
    own = read_settings({"min_p": 0.1, "stop_strings": "end"}, "s")
    assert (own.min_p, own.stop_strings, own.ignored) == (0.1, ("end",), ())
    with pytest.raises(BundleError, match="stop_strings is \\[''\\], expected a list of texts"):
        read_settings({"stop_strings": [""]}, "s")


def test_an_invalid_value_is_refused() -> None:
    with pytest.raises(BundleError, match="repetition_penalty is 0, expected more"):
        read_settings({"repetition_penalty": 0}, "s")
