"""The losses are those of the models themselves, however they are computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from loradeploy.adapter import AdapterConfig
from loradeploy.lora.inject import inject
from loradeploy.train.data import read_conversations
from loradeploy.train.features import Collator, conversation_features
from loradeploy.train.losses import causal_lm_loss, classification_loss
from tests.tolerances import tolerance


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_logits_at_labels_alone_give_the_loss_and_gradients_of_all_logits(
    model: str, lessons: Path, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoded = conversation_features(read_conversations(lessons), tokenizer, 64)
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


def test_a_model_that_cannot_choose_its_logits_gives_the_same(
    tiny_llama: Path, lessons: Path
) -> None:
    class Plain(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **feeds: torch.Tensor) -> object:
            return self.inner(**feeds)

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    encoded = conversation_features(read_conversations(lessons), tokenizer, 64)
    batch = Collator(tokenizer.pad_token_id)(encoded.features)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        chosen, whole = causal_lm_loss(model, batch), causal_lm_loss(Plain(model), batch)
    assert float(chosen.total) == pytest.approx(float(whole.total), rel=1e-5)
    assert (chosen.items, chosen.right) == (whole.items, whole.right)


def test_a_classifiers_loss_is_its_own(tiny_bert: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3).eval()
    batch = Collator(0)([{"input_ids": list(range(5, 9 + n)), "labels": n % 3} for n in range(4)])
    with torch.no_grad():
        summed, theirs = classification_loss(model, batch), model(**batch)
    assert float(summed.total / summed.items) == pytest.approx(float(theirs.loss), rel=1e-5)
    assert int(summed.right) == int((theirs.logits.argmax(-1) == batch["labels"]).sum())
