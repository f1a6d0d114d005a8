"""The classification head is found and trained for every base model, and PEFT reads the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from loradeploy.adapter import load_adapter
from loradeploy.errors import ModelError
from loradeploy.lora.inject import load
from tests.tolerances import tolerance
from tests.train.conftest import Quick

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 512}

# Published encoders and decoders, and which of their modules are fully trained.
BASES: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**SIZES)), {"classifier"}),
    "bert-without-pooler": (
        lambda: transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False),
        {"classifier", "bert.pooler"},
    ),
    "roberta": (
        lambda: transformers.RobertaModel(
            transformers.RobertaConfig(**SIZES), add_pooling_layer=False
        ),
        {"classifier"},
    ),
    "distilbert": (
        lambda: transformers.DistilBertModel(transformers.DistilBertConfig(**DISTILBERT)),
        {"pre_classifier", "classifier"},
    ),
    "llama": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{**SIZES, "pad_token_id": None})
        ),
        {"score"},
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=130, vocab_size=512)
        ),
        {"score"},
    ),
    "classifier-of-other-labels": (
        lambda: transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**SIZES, num_labels=7)
        ),
        {"classifier"},
    ),
    "classifier-of-as-many-labels": (
        lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(**SIZES, num_labels=3)
        ),
        {"classifier"},
    ),
}


@pytest.fixture(params=BASES, ids=list(BASES))
def base(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> tuple[Path, set[str]]:
    make, heads = BASES[request.param]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    return tmp_path / "base", heads


def classifier(directory: Path) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=3, ignore_mismatched_sizes=True
    )
    model.config.pad_token_id = 0
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[9, 8, 7, 6, 5], [9, 8, 7, 0, 0]])
    return model(input_ids=ids, attention_mask=(ids != 0).long()).logits


@pytest.mark.breadth(2)
def test_a_classifier_on_any_base_is_read_by_peft(
    base: tuple[Path, set[str]], topics: Path, tmp_path: Path, quick: Quick
) -> None:
    import peft

    directory, heads = base
    result = quick(
        directory,
        topics,
        tmp_path / "adapter",
        task="sequence-classification",
        learning_rate=5e-3,
    )
    adapter = load_adapter(result.adapter)
    assert set(adapter.config.modules_to_save) == heads
    assert {name.rpartition(".")[0] for name in adapter.saved}.isdisjoint(adapter.modules)

    ours, fresh = classifier(directory), classifier(directory)
    load(ours, adapter)
    theirs = peft.PeftModel.from_pretrained(classifier(directory), result.adapter).eval()
    assert float((logits(ours) - logits(theirs)).abs().max()) <= tolerance("same-torch")
    assert float((logits(ours) - logits(fresh)).abs().max()) > 0.01, "the adapter did nothing"


def test_a_decoder_padded_with_its_end_token_uses_the_last_real_token(
    tiny_llama: Path, topics: Path, tmp_path: Path, quick: Quick
) -> None:
    """Texts of many lengths in a batch have the same scores as alone."""
    directory = tmp_path / "base"
    shutil.copytree(tiny_llama, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(directory)
    losses = [
        quick(
            directory,
            topics,
            tmp_path / f"adapter-{size}",
            task="sequence-classification",
            batch_size=size,
        ).loss_before
        for size in (1, 8)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=tolerance("same-torch"))


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_directory_without_a_model_is_refused(
    name: str, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=name):
        quick(tmp_path / name, lessons, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("masked_lm", "message"),
    [
        (False, "has no weights for cls.* it is not a causal-lm model"),
        (True, "BertLMHeadModel is not a causal-lm model: .* depends on this token"),
    ],
)
def test_an_encoder_is_refused_as_a_language_model(
    masked_lm: bool, message: str, tiny_bert: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    base = tiny_bert
    if masked_lm:  # as published encoders have it
        base = shutil.copytree(tiny_bert, tmp_path / "base")
        transformers.BertForMaskedLM.from_pretrained(tiny_bert).save_pretrained(base)
    with pytest.raises(ModelError, match=message):
        quick(base, lessons, tmp_path / "adapter")


def test_weights_of_another_model_are_refused(
    tiny_bert: Path, tiny_llama: Path, topics: Path, tmp_path: Path, quick: Quick
) -> None:
    shutil.copytree(tiny_bert, tmp_path / "base")
    shutil.copy(tiny_llama / "model.safetensors", tmp_path / "base")
    with pytest.raises(ModelError, match="no weights for the encoder"):
        quick(tmp_path / "base", topics, tmp_path / "adapter", task="sequence-classification")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{broken}", "safetensors"),
        ("config.json", b'{"model_type": "unheard-of"}', "config.json cannot be used"),
        ("config.json", b"{", "config.json is not readable as JSON"),
        ("tokenizer.json", b"{", "has no tokenizer that can be used"),
    ],
)
def test_a_broken_file_of_the_model_is_named(
    file: str,
    content: bytes,
    message: str,
    tiny_llama: Path,
    lessons: Path,
    tmp_path: Path,
    quick: Quick,
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "base")
    (tmp_path / "base" / file).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        quick(tmp_path / "base", lessons, tmp_path / "adapter")


def test_a_tokenizer_of_another_model_is_refused(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    small = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "vocab_size": 500}))
    small.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="the tokenizer has 512 tokens, the model 500"):
        quick(tmp_path / "base", lessons, tmp_path / "adapter")
