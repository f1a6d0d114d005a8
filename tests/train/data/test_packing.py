"""Packed batches have no padding and the same loss and gradients as padded ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3Config,
)

from loradeploy.adapter import AdapterConfig
from loradeploy.lora.inject import Injection, inject
from loradeploy.train.data import packing
from loradeploy.train.data.features import Collator
from loradeploy.train.data.packing import PackingCollator, enable_packing
from loradeploy.train.tasks.losses import causal_lm_loss
from tests.tolerances import tolerance
from tests.train.conftest import Quick

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 99}
WIDE = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}

PACKING: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**WIDE),
    "mistral-window-of-10": MistralConfig(**WIDE, sliding_window=10),
    "gemma3-window-of-4": Gemma3TextConfig(**WIDE, sliding_window=4, eos_token_id=1),
    "qwen3": Qwen3Config(**WIDE),
    "gpt2": GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=99, eos_token_id=1),
    "gpt-neox": GPTNeoXConfig(**SMALL, intermediate_size=64),
    "opt": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32),
}
NOT_PACKING: dict[str, PreTrainedConfig] = {
    "gemma2-soft-capped": Gemma2Config(**WIDE, eos_token_id=1),
    "bloom-position-biases": BloomConfig(n_layer=2, hidden_size=32, n_head=4, vocab_size=99),
    # Longer than the examples of the trial.
    "qwen2-moe-window-of-masks-only": Qwen2MoeConfig(
        **WIDE, sliding_window=10, use_sliding_window=True, layer_types=["sliding_attention"] * 2
    ),
    "mamba-recurrent": MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=99),
}


def features(count: int = 4) -> list[dict[str, Any]]:
    """Return examples of 3, 6, 9, … tokens with the loss on the last two."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(1, count + 1):
        ids = torch.randint(2, 99, (3 * number,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:]})
    return made


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()  # no dropout
    for parameter in model.parameters():  # large weights, so that attention matters
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def adapter_in(model: PreTrainedModel) -> Injection:
    injection = inject(model, AdapterConfig(r=4, target_modules="all-linear"))
    for layer in injection.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return injection


def loss_and_gradients(
    injection: Injection, batch: dict[str, torch.Tensor]
) -> tuple[float, list[torch.Tensor]]:
    loss = causal_lm_loss(injection.model, batch)
    mean = loss.total / loss.items
    return float(mean.detach()), list(torch.autograd.grad(mean, injection.parameters()))


@pytest.mark.parametrize("name", PACKING)
def test_a_packed_batch_has_the_loss_and_gradients_of_the_padded_one(name: str) -> None:
    injection = adapter_in(model_of(PACKING[name]))
    padded_loss, padded = loss_and_gradients(injection, Collator(0)(features()))
    assert enable_packing(injection.model)
    packed_loss, packed = loss_and_gradients(injection, PackingCollator()(features()))
    assert packed_loss == pytest.approx(padded_loss, abs=tolerance("same-torch"))
    for one, other in zip(packed, padded, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance("same-torch"), rtol=1e-4)


def test_examples_that_attend_to_each_other_have_another_loss() -> None:
    injection = adapter_in(model_of(PACKING["llama"]))
    assert enable_packing(injection.model)
    batch = PackingCollator()(features())
    apart, _ = loss_and_gradients(injection, batch)
    whole = torch.tensor([0, batch["input_ids"].shape[1]], dtype=torch.int32)
    together, _ = loss_and_gradients(injection, {**batch, "cu_seq_lens_q": whole})
    assert abs(apart - together) > 100 * tolerance("same-torch")


@pytest.mark.parametrize("name", NOT_PACKING)
def test_a_model_that_does_not_support_packing_is_not_packed(name: str) -> None:
    model = model_of(NOT_PACKING[name])
    before = model.config._attn_implementation
    assert not enable_packing(model)
    assert model.config._attn_implementation == before
    assert float(causal_lm_loss(model, Collator(0)(features())).total.detach()) > 0


def test_a_model_that_leaks_between_packed_examples_is_detected_by_a_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def leaking(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        options.pop("cu_seq_lens_q", None)
        return packing.sdpa_attention_forward(module, query, key, value, None, **options)

    monkeypatch.setattr(packing, "packed_attention", leaking)
    assert not enable_packing(model_of(PACKING["llama"]))


def test_a_run_has_the_same_losses_packed_and_padded(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    curves = []
    for packed in (True, False):
        output = tmp_path / f"packed-{packed}"
        quick(tiny_llama, lessons, output, packing=packed, learning_rate=5e-3)
        rows = (output / "loss.csv").read_text().splitlines()[1:]
        curves.append([float(row.split(",")[1]) for row in rows])
    assert curves[0] == pytest.approx(curves[1], abs=5 * tolerance("same-torch"))
    assert len(set(curves[0])) == len(curves[0]) > 1
