"""Modules are fused only if they compute what the function computes; results stay the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    NemotronConfig,
    OlmoConfig,
    PreTrainedConfig,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from loradeploy.adapter import AdapterConfig
from loradeploy.lora.inject import Injection, inject
from loradeploy.train.data.features import Collator
from loradeploy.train.data.packing import PackingCollator, enable_packing
from loradeploy.train.fusion import modules
from loradeploy.train.fusion.attention import recorded
from loradeploy.train.fusion.modules import fuse
from loradeploy.train.tasks.losses import causal_lm_loss
from tests.tolerances import tolerance

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 99}
WIDE = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}

# The number of fused modules: norms, MLPs and attention.
FUSED: dict[str, tuple[PreTrainedConfig, int]] = {
    "llama": (LlamaConfig(**WIDE), 5 + 2 + 2),
    "qwen3-norms-of-heads": (Qwen3Config(**WIDE), 9 + 2 + 0),
    "mistral-window": (MistralConfig(**WIDE, sliding_window=3), 5 + 2 + 2),
    "gemma3-weights-from-1-and-gelu": (Gemma3TextConfig(**WIDE, eos_token_id=1), 13 + 0 + 0),
    "olmo-clamps-projections-in-place": (
        OlmoConfig(**WIDE, clip_qkv=0.2, eos_token_id=1),
        0 + 2 + 0,
    ),
    # With one pair of each head rotated, which would be broadcast to the whole head.
    "nemotron-rotates-a-part": (
        NemotronConfig(
            **WIDE,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
            },
        ),
        0 + 0 + 2,
    ),
    "gpt2-layer-norms": (
        GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=99, eos_token_id=1),
        0,
    ),
}


def injected(config: PreTrainedConfig, *, fused: int | None) -> Injection:
    """Return a model with an adapter; `fused`: the number of modules to be fused."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.15)
    if fused is not None:
        assert fuse(model) == fused
    injection = inject(model, AdapterConfig(r=4, target_modules="all-linear"))
    for layer in injection.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return injection


def loss_and_gradients(injection: Injection) -> tuple[Tensor, list[Tensor]]:
    ids = torch.randint(2, 99, (7,), generator=torch.Generator().manual_seed(1)).tolist()
    loss = causal_lm_loss(injection.model, Collator(0)([{"input_ids": ids, "labels": ids}]))
    return loss.total, list(torch.autograd.grad(loss.total, injection.parameters()))


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_model_has_the_loss_and_gradients_of_the_original(name: str) -> None:
    config, count = FUSED[name]
    original, original_slopes = loss_and_gradients(injected(config, fused=None))
    fused, slopes = loss_and_gradients(injected(config, fused=count))
    torch.testing.assert_close(fused, original, atol=0, rtol=tolerance("same-torch"))
    assert any(bool(slope.any()) for slope in slopes)
    for one, other in zip(slopes, original_slopes, strict=True):
        limit = tolerance("same-torch") * max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one, other, atol=limit, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_a_packed_batch_of_a_fused_model_has_the_loss_and_gradients_of_the_padded_one(
    name: str,
) -> None:
    config, count = FUSED[name]
    ids = torch.randint(2, 99, (16,), generator=torch.Generator().manual_seed(1)).tolist()
    examples = [
        {"input_ids": row, "labels": [-100, *row[1:]]} for row in (ids[:5], ids[5:7], ids[7:])
    ]
    original, packed = (injected(config, fused=fused) for fused in (None, count))
    assert enable_packing(packed.model)
    results = []
    for injection, batch in (
        (original, Collator(0)(examples)),
        (packed, PackingCollator()(examples)),
    ):
        loss = causal_lm_loss(injection.model, batch).total
        results.append([loss, *torch.autograd.grad(loss, injection.parameters())])
    for one, other in zip(*results, strict=True):
        limit = tolerance("same-torch") * max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one, other, atol=limit, rtol=1e-4)


class Attending(LlamaAttention):
    """Llama's attention, of which one detail differs."""

    def __init__(self, detail: str) -> None:
        super().__init__(LlamaConfig(**WIDE, attn_implementation="sdpa"), 0)
        self.detail = detail
        self.attention_dropout = 0.5 if detail == "dropout" else 0.0

    def forward(self, hidden_states: Tensor, **options: Any) -> Any:
        if self.detail == "gate":
            y, weights = super().forward(hidden_states, **options)
            return y * torch.sigmoid(hidden_states), weights
        if self.detail == "clamped":
            hidden_states = hidden_states.clamp(max=700.0)
        if self.detail == "option by length":
            options["window"] = 2 if hidden_states.shape[1] > 3 else None
        return super().forward(hidden_states, **options)


class Scaled(Attending):
    """Llama's attention, with an option that it uses itself, as Ministral 3 does."""

    def forward(self, hidden_states: Tensor, scale: float | None = None, **options: Any) -> Any:
        return super().forward(hidden_states * (1.0 if scale is None else scale), **options)


def test_an_option_that_the_attention_takes_by_name_is_its_own() -> None:
    torch.manual_seed(0)
    module = Scaled("")
    x, angles = torch.randn(1, 3, 32), torch.randn(1, 3, 8)
    given = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
    expected, plain = (module(x, **given, **options)[0] for options in ({"scale": 3.0}, {}))
    fused = recorded(module)
    assert fused is not None
    assert torch.equal(fused(x, **given, scale=3.0)[0], expected)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(fused(x, **given)[0], plain, atol=tolerance("same-torch"), rtol=1e-4)


@pytest.mark.parametrize("detail", ["gate", "clamped", "dropout", "option by length"])
def test_an_attention_that_computes_something_else_is_not_fused(detail: str) -> None:
    torch.manual_seed(0)
    plain = Attending("")
    assert recorded(plain) is not None
    assert plain.config._attn_implementation == "sdpa"
    assert recorded(Attending(detail)) is None


class Norm(nn.Module):
    """An RMSNorm of which one detail differs."""

    def __init__(self, detail: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.5))
        self.eps = 1e-3
        self.detail = detail

    def forward(self, x: Tensor) -> Tensor:
        if self.detail == "centered":
            x = x - x.mean(-1, keepdim=True)
        epsilon = self.eps * (10 if self.detail == "another epsilon" else 1)
        y = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
        return nn.functional.dropout(y, 0.5, self.training and self.detail == "dropout")


class Gated(nn.Module):
    """A gated MLP of which one detail differs."""

    def __init__(self, detail: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down_proj = nn.Linear(12, 8)
        self.detail = detail

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.detail == "clamped":
            gate = gate.clamp(max=700.0)
        act = nn.functional.gelu if self.detail == "gelu" else nn.functional.silu
        return self.down_proj(act(gate) * up)


@pytest.mark.parametrize("detail", ["centered", "another epsilon", "dropout"])
def test_a_norm_that_computes_something_else_is_not_fused(detail: str) -> None:
    assert modules._norm(Norm("")) is not None
    assert modules._norm(Norm(detail)) is None


@pytest.mark.parametrize("detail", ["clamped", "gelu"])
def test_an_mlp_that_computes_something_else_is_not_fused(detail: str) -> None:
    torch.manual_seed(0)
    assert modules._gated_mlp(Gated("")) is not None
    assert modules._gated_mlp(Gated(detail)) is None


def test_a_norm_that_is_trained_gets_its_gradient() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**WIDE)).eval()
    fuse(model)
    config = AdapterConfig(r=4, target_modules="all-linear", modules_to_save=("norm",))
    injection = inject(model, config)
    _, slopes = loss_and_gradients(injection)
    saved = [slopes[-1]] if injection.saved else []
    assert saved and bool(saved[0].any())


def test_a_norm_that_is_called_with_a_gate_computes_its_own() -> None:
    """Mamba-2 has such norms."""
    torch.manual_seed(0)
    sizes = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}
    model = AutoModelForCausalLM.from_config(
        Mamba2Config(num_hidden_layers=2, hidden_size=32, vocab_size=99, **sizes)
    )
    ids = torch.tensor([[5, 7, 11, 3]])
    expected = model(ids).logits
    assert fuse(model) > 0
    torch.testing.assert_close(model(ids).logits, expected, atol=tolerance("same-torch"), rtol=0)


def test_a_module_keeps_its_mode() -> None:
    norm = Norm("").eval()
    assert modules._norm(norm) is not None
    assert not norm.training
