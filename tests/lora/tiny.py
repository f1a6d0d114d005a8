"""Tiny models with every kind of layer that supports LoRA, and a few training steps on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

_TOKENS: Final = torch.arange(3, 27).reshape(2, 12)
_SPECIAL: Final = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 64}
_LABELS: Final = torch.tensor([0, 2])


def _llama(*, tied: bool = False, size: int = 32) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=size,
            intermediate_size=size * 3 // 2,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            **_SPECIAL,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2, **_SPECIAL
        )
    )


def _vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=4,
            num_labels=3,
            initializer_range=0.2,
        )
    )


def _convnext() -> nn.Module:
    return ConvNextForImageClassification(
        ConvNextConfig(
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_stages=2,
            num_labels=3,
            initializer_range=0.2,
            layer_scale_init_value=0.5,
        )
    )


def _bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=32,
            num_labels=3,
            initializer_range=0.2,
            vocab_size=64,
        )
    )


# Each function builds the same weights at every call.
MODELS: Final[Mapping[str, Callable[[], nn.Module]]] = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tied=True),
    "llama-wide": lambda: _llama(size=128),
    "gpt2": _gpt2,
    "bert": _bert,
    "vit": _vit,
    "convnext": _convnext,
}


def model(name: str) -> nn.Module:
    """Return the tiny model `name` in evaluation mode, with nonzero biases."""
    torch.manual_seed(0)
    built = MODELS[name]().eval()
    with torch.no_grad():
        for parameter_name, parameter in built.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)
    return built


def batch(name: str) -> dict[str, Tensor]:
    """Return inputs of the model `name`, with labels."""
    if name in ("vit", "convnext"):
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        return {"pixel_values": pixels, "labels": _LABELS}
    return {"input_ids": _TOKENS, "labels": _LABELS if name == "bert" else _TOKENS}


@torch.no_grad()
def logits(net: nn.Module, name: str) -> Tensor:
    """Return the logits of `net`, which is the model `name` with or without an adapter."""
    result: Any = net.eval()(**_for(net, name))
    return result.logits


def loss(net: nn.Module, name: str) -> Tensor:
    """Return the loss of `net` on its batch, with its autograd graph."""
    result: Any = net(**_for(net, name))
    return result.loss


def _for(net: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the batch in the dtype of the model."""
    width = next(p.dtype for n, p in net.named_parameters() if "lora" not in n)
    return {k: v.to(width) if v.is_floating_point() else v for k, v in batch(name).items()}


def train(net: nn.Module, name: str, parameters: Iterable[nn.Parameter], steps: int = 4) -> None:
    """Train a few steps with AdamW."""
    net.train()
    optimizer = torch.optim.AdamW(list(parameters), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, name).backward()
        optimizer.step()
    net.eval()


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference."""
    return float((one.double() - other.double()).abs().max())
