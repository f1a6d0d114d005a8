"""The last layer computes only the tokens with labels: the loss and its gradients stay the same."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from loradeploy.adapter import AdapterConfig
from loradeploy.lora.inject import Injection, inject
from loradeploy.train.data.packing import PackingCollator, enable_packing
from loradeploy.train.fusion import last_layer
from loradeploy.train.fusion.last_layer import output_at, shorten
from loradeploy.train.fusion.modules import fuse
from loradeploy.train.tasks.losses import causal_lm_loss
from tests.tolerances import tolerance
from tests.train.conftest import Quick

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 99}
WIDE = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}

SHORTENED: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**WIDE),
    "mistral-window-of-4": MistralConfig(**WIDE, sliding_window=4),
    "qwen2-biases": Qwen2Config(**WIDE),
}


def packed(config: PreTrainedConfig) -> Injection:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).train()
    for parameter in model.parameters():  # large weights, so that attention matters
        torch.nn.init.normal_(parameter, mean=0.1 if parameter.ndim == 1 else 0.0, std=0.15)
    fuse(model)
    injection = inject(model, AdapterConfig(r=4, target_modules="all-linear"))
    for layer in injection.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    assert enable_packing(model)
    return injection


def batch() -> dict[str, Any]:
    """Examples of 3 to 9 tokens: labels at the end, in the middle, everywhere; one without."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length, labeled in ((9, (7, 8)), (5, ()), (8, (2, 5)), (3, (1, 2))):
        ids = torch.randint(2, 99, (length,), generator=generator).tolist()
        labels = [token if place in labeled else -100 for place, token in enumerate(ids)]
        made.append({"input_ids": ids, "labels": labels})
    return PackingCollator()(made)


def loss_and_gradients(injection: Injection) -> list[torch.Tensor]:
    loss = causal_lm_loss(injection.model, batch()).total
    return [loss, *torch.autograd.grad(loss, injection.parameters())]


@pytest.mark.parametrize("name", SHORTENED)
def test_the_loss_and_gradients_are_those_of_the_whole_layer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    injection = packed(SHORTENED[name])
    whole = loss_and_gradients(injection)
    assert shorten(injection.model)
    widths: list[int] = []
    last = injection.model.model.layers[-1]  # type: ignore[union-attr]
    last.mlp.register_forward_hook(lambda *called: widths.append(called[-1].shape[1]))
    shortened = loss_and_gradients(injection)
    assert widths == [6]
    for one, other in zip(shortened, whole, strict=True):
        limit = tolerance("same-torch") * max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one, other, atol=limit, rtol=1e-4)


def test_outside_of_the_loss_all_tokens_have_logits() -> None:
    model = packed(SHORTENED["llama"]).model
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    before = model(**inputs, use_cache=False).logits
    assert shorten(model)
    assert torch.equal(model(**inputs, use_cache=False).logits, before)
    with output_at(model, torch.tensor([3, 7])):
        some = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(some, before[:, [3, 7]], atol=tolerance("same-torch"), rtol=1e-4)


def test_with_gradient_checkpointing_the_whole_layer_is_computed() -> None:
    injection = packed(SHORTENED["llama"])
    whole = loss_and_gradients(injection)
    assert shorten(injection.model)
    injection.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    for one, other in zip(loss_and_gradients(injection), whole, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance("same-torch"), rtol=1e-4)


def test_a_layer_that_computes_something_else_is_not_shortened() -> None:
    model = packed(SHORTENED["llama"]).model
    last: Any = model.model.layers[-1]  # type: ignore[union-attr]
    own = type(last).forward

    class Shifted(type(last)):  # type: ignore[misc]
        def forward(self, *given: Any, **named: Any) -> Any:
            return 0.3 + own(self, *given, **named)

    last.__class__ = Shifted
    assert not shorten(model)
    assert "forward" not in vars(last) and model not in last_layer._LAST


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_layer_with_dropout_of_its_sums_is_not_shortened(dropout: float) -> None:
    """As StableLM's, which a trial without dropout does not show."""
    model = packed(SHORTENED["llama"]).model
    last: Any = model.model.layers[-1]  # type: ignore[union-attr]
    own = type(last).forward

    class Dropping(type(last)):  # type: ignore[misc]
        def forward(self, *given: Any, **named: Any) -> Any:
            return self.dropout(own(self, *given, **named))

    last.__class__, last.dropout = Dropping, torch.nn.Dropout(dropout)
    assert shorten(model) == (not dropout)


def test_another_architecture_is_not_shortened() -> None:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=99, eos_token_id=1)
    assert not shorten(packed(config).model)


def test_a_run_of_packed_examples_computes_its_last_layer_at_labels(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = []
    for name, prepare in (("whole", lambda model: False), ("shortened", shorten)):
        monkeypatch.setattr(import_module("loradeploy.train.job"), "shorten", prepare)
        quick(tiny_llama, lessons, tmp_path / name, learning_rate=5e-3)
        rows = (tmp_path / name / "loss.csv").read_text().splitlines()[1:]
        curves.append([float(row.split(",")[1]) for row in rows])
    assert curves[0] == pytest.approx(curves[1], abs=5 * tolerance("same-torch"))
    assert len(set(curves[0])) == len(curves[0]) > 1
