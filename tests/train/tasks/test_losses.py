"""The computed losses equal those of the models themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
)

from loradeploy.adapter import AdapterConfig
from loradeploy.lora.inject import inject
from loradeploy.train.data.examples import read_conversations
from loradeploy.train.data.features import Collator, conversation_features
from loradeploy.train.data.sources import Source
from loradeploy.train.tasks import losses
from loradeploy.train.tasks.losses import causal_lm_loss, classification_loss
from tests.tolerances import tolerance


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_logits_only_at_labels_give_the_loss_and_gradients_of_all_logits(
    model: str, lessons: Path, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoded = conversation_features(read_conversations(Source(lessons)), tokenizer, 64)
    batch = Collator(tokenizer.pad_token_id)(encoded.features)
    base = AutoModelForCausalLM.from_pretrained(directory)
    injection = inject(base, AdapterConfig(r=4, target_modules="all-linear"))
    for layer in injection.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)

    summed = causal_lm_loss(base, batch)
    ours = summed.total / summed.items
    result = base(**batch)
    gradients = [
        torch.autograd.grad(loss, injection.parameters(), retain_graph=True)
        for loss in (ours, result.loss)
    ]
    right = result.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]

    assert abs(float((ours - result.loss).detach())) <= tolerance("same-torch")
    assert int(summed.right) == int(right.sum())
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance("same-torch"), rtol=1e-4)


def test_a_model_without_logits_to_keep_gives_the_same_loss(
    tiny_llama: Path, lessons: Path
) -> None:
    class Plain(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **feeds: torch.Tensor) -> object:
            return self.inner(**feeds)

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    encoded = conversation_features(read_conversations(Source(lessons)), tokenizer, 64)
    batch = Collator(tokenizer.pad_token_id)(encoded.features)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        chosen, whole = causal_lm_loss(model, batch), causal_lm_loss(Plain(model), batch)
    assert float(chosen.total) == pytest.approx(float(whole.total), rel=1e-5)
    assert (chosen.items, chosen.right) == (whole.items, whole.right)


def test_softcapping_of_logits_is_applied_in_the_loss() -> None:
    config = Gemma2Config(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        vocab_size=99,
        final_logit_softcapping=0.5,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    ids = torch.randint(2, 99, (2, 9))
    batch = {"input_ids": ids, "labels": ids}
    with torch.no_grad():
        for _ in range(2):  # detected at the first batch, known at the second
            ours = causal_lm_loss(model, batch)
            assert float(ours.total / ours.items) == pytest.approx(
                float(model(**batch).loss), abs=tolerance("same-torch")
            )


def test_chunked_logits_give_the_same_loss(
    tiny_llama: Path, lessons: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    encoded = conversation_features(read_conversations(Source(lessons)), tokenizer, 64)
    batch = Collator(tokenizer.pad_token_id)(encoded.features)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    injection = inject(base, AdapterConfig(r=4, target_modules="all-linear"))
    results = []
    for size in (losses._CHUNK, 1, 3 * base.config.vocab_size):
        monkeypatch.setattr(losses, "_CHUNK", size)
        loss = causal_lm_loss(base, batch)
        results.append((loss, torch.autograd.grad(loss.total, injection.parameters())))
    (whole, slopes), *others = results
    for loss, gradients in others:
        assert loss.total.tolist() == pytest.approx(whole.total.tolist(), rel=1e-6)
        assert (loss.items, loss.right) == (whole.items, whole.right)
        for one, other in zip(gradients, slopes, strict=True):
            torch.testing.assert_close(one, other, atol=tolerance("same-torch"), rtol=1e-4)


def test_a_head_that_is_trained_gets_its_gradients(tiny_llama: Path, lessons: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    encoded = conversation_features(read_conversations(Source(lessons)), tokenizer, 64)
    batch = Collator(tokenizer.pad_token_id)(encoded.features)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    injection = inject(base, AdapterConfig(r=4, target_modules=("lm_head", "q_proj")))
    summed = causal_lm_loss(base, batch)
    gradients = [
        torch.autograd.grad(loss, injection.parameters(), retain_graph=True)
        for loss in (summed.total / summed.items, base(**batch).loss)
    ]
    assert float(gradients[0][1].abs().max()) > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance("same-torch"), rtol=1e-4)


def test_no_gradients_are_computed_below_the_first_adapted_layer(
    tiny_llama: Path, lessons: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    encoded = conversation_features(read_conversations(Source(lessons)), tokenizer, 64)
    batch = Collator(tokenizer.pad_token_id)(encoded.features)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = AdapterConfig(r=4, target_modules=("q_proj",), layers_to_transform=(1,))
    inject(base, config)
    needing = {}
    for name in ("model.layers.0", "model.layers.1", "model.embed_tokens"):
        base.get_submodule(name).register_forward_hook(
            lambda module, given, result, name=name: needing.update({name: result.requires_grad})
        )
    causal_lm_loss(base, batch)
    assert needing == {
        "model.embed_tokens": False,
        "model.layers.0": False,
        "model.layers.1": True,
    }


def test_a_batch_without_labels_has_no_loss(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.randint(2, 20, (2, 6))
    summed = causal_lm_loss(model, {"input_ids": ids, "labels": torch.full_like(ids, -100)})
    assert (summed.total.item(), int(summed.items), int(summed.right)) == (0, 0, 0)


def test_the_loss_of_a_classifier_is_that_of_the_model(tiny_bert: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3).eval()
    batch = Collator(0)([{"input_ids": list(range(5, 9 + n)), "labels": n % 3} for n in range(4)])
    with torch.no_grad():
        summed, theirs = classification_loss(model, batch), model(**batch)
    assert float(summed.total / summed.items) == pytest.approx(float(theirs.loss), rel=1e-5)
    assert int(summed.right) == int((theirs.logits.argmax(-1) == batch["labels"]).sum())


class Flattening(torch.nn.Module):
    """A model that gives its head [tokens, hidden] of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)
        self.head.requires_grad_(False)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **options: Any) -> SimpleNamespace:
        logits = self.head(self.embed(input_ids).flatten(0, 1))
        return SimpleNamespace(logits=logits.view(*input_ids.shape, -1))


class ScalingInPlace(Flattening):
    """A model that changes its logits in place, after the head."""

    def forward(self, input_ids: torch.Tensor, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embed(input_ids)).mul_(3))


@pytest.mark.parametrize("kind", [Flattening, ScalingInPlace])
def test_a_model_with_other_logits_than_those_of_the_head_gets_their_loss(
    kind: type[torch.nn.Module],
) -> None:
    torch.manual_seed(0)
    model = kind()
    ids = torch.randint(0, 9, (2, 5))
    labels = ids.clone()
    labels[0, :3] = -100
    loss = causal_lm_loss(model, {"input_ids": ids, "labels": labels})
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss.total, expected, atol=tolerance("same-torch"), rtol=1e-5)
    assert int(loss.items) == 6
