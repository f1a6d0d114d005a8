"""Tiny models with random weights of many architectures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loradeploy.adapter.tasks import TASK_TABLE

_TOKENS: Final = {"vocab_size": 120, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


_COMMON: Final = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **_TOKENS,
}


_DECODER: Final = {
    **_COMMON,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


_ENCODER: Final = {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 64}


_GEMMA: Final = {**_DECODER, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}


# The task, config class and values by name; the name says which feature is tested.
ARCHITECTURES: Final[Mapping[str, tuple[str, str, dict[str, Any]]]] = {
    "mistral: a sliding window": (
        "causal-lm",
        "MistralConfig",
        {**_DECODER, "sliding_window": 4},
    ),
    "qwen2: biases": ("causal-lm", "Qwen2Config", _DECODER),
    "qwen3: normalized heads": ("causal-lm", "Qwen3Config", {**_DECODER, "head_dim": 8}),
    "gemma2: capped logits, eager attention": ("causal-lm", "Gemma2Config", _GEMMA),
    "gemma3: two kinds of layers": ("causal-lm", "Gemma3TextConfig", _GEMMA),
    "phi3: fused projections": ("causal-lm", "Phi3Config", _DECODER),
    "gpt-neox: partial rotation": (
        "causal-lm",
        "GPTNeoXConfig",
        {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 64},
    ),
    "gpt-neo: layers that see a window, by a table": (
        "causal-lm",
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 4,
            "window_size": 4,
            "max_position_embeddings": 64,
            **_TOKENS,
        },
    ),
    "opt: positions from the mask": (
        "causal-lm",
        "OPTConfig",
        {**_COMMON, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "falcon: one key head for all": ("causal-lm", "FalconConfig", _COMMON),
    "smollm3: layers without rotation": (
        "causal-lm",
        "SmolLM3Config",
        {**_DECODER, "num_hidden_layers": 4},
    ),
    "gemma: scaled embeddings": ("causal-lm", "GemmaConfig", {**_DECODER, "head_dim": 8}),
    "granite: multipliers": ("causal-lm", "GraniteConfig", _DECODER),
    "olmo2: norms behind": ("causal-lm", "Olmo2Config", _DECODER),
    "phi: attention and mlp side by side": (
        "causal-lm",
        "PhiConfig",
        {**_DECODER, "num_key_value_heads": 4},
    ),
    "bloom: biased by distance": (
        "causal-lm",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, **_TOKENS},
    ),
    "falcon: biased by distance, in bfloat16": (
        "causal-lm",
        "FalconConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": True,
            **_TOKENS,
        },
    ),
    "mixtral: a mixture of experts": (
        "causal-lm",
        "MixtralConfig",
        {**_DECODER, "num_local_experts": 4},
    ),
    "qwen3-moe: many small experts": (
        "causal-lm",
        "Qwen3MoeConfig",
        {
            **_DECODER,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "distilbert: other names": (
        "sequence-classification",
        "DistilBertConfig",
        {
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 64,
            **_TOKENS,
        },
    ),
    "electra: a head of two layers": (
        "sequence-classification",
        "ElectraConfig",
        {**_ENCODER, "embedding_size": 32},
    ),
    "albert: one layer many times": (
        "sequence-classification",
        "AlbertConfig",
        {**_ENCODER, "embedding_size": 16},
    ),
    "roberta: a head of two layers": (
        "sequence-classification",
        "RobertaConfig",
        {**_ENCODER, "type_vocab_size": 1},
    ),
    "modernbert: local attention": (
        "sequence-classification",
        "ModernBertConfig",
        {**_ENCODER, "num_hidden_layers": 3, "local_attention": 8},
    ),
    "modernbert-tags: labels of tokens": (
        "token-classification",
        "ModernBertConfig",
        {**_ENCODER, "num_hidden_layers": 3, "local_attention": 8},
    ),
    "modernbert-states: hidden states": (
        "feature-extraction",
        "ModernBertConfig",
        {**_ENCODER, "num_hidden_layers": 3, "local_attention": 8},
    ),
    "xlm-roberta: positions counted from the padding on": (
        "sequence-classification",
        "XLMRobertaConfig",
        {**_ENCODER, "type_vocab_size": 1},
    ),
    "xlm-roberta-tags: labels of tokens": (
        "token-classification",
        "XLMRobertaConfig",
        {**_ENCODER, "type_vocab_size": 1},
    ),
    "xlm-roberta-states: hidden states and a pooler": (
        "feature-extraction",
        "XLMRobertaConfig",
        {**_ENCODER, "type_vocab_size": 1},
    ),
    "esm: rotation by a setting of its own, tokens scaled by how many are masked": (
        "token-classification",
        "EsmConfig",
        {
            **_ENCODER,
            "mask_token_id": 3,
            "position_embedding_type": "rotary",
            "token_dropout": True,
        },
    ),
    # Projects its position table, which has no batch axis, with the layers that project tokens.
    "deberta: layers for tokens and for positions": (
        "sequence-classification",
        "DebertaV2Config",
        {
            **_ENCODER,
            "type_vocab_size": 0,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "position_biased_input": False,
        },
    ),
    "deberta: layers for positions alone": (
        "sequence-classification",
        "DebertaV2Config",
        {
            **_ENCODER,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": False,
        },
    ),
}


_ATTENTION: Final = ["q_proj", "k_proj", "v_proj", "o_proj"]


# Architectures where not all linear layers are adapted: experts are not separate layers, and PEFT
# cannot both adapt and save a part of a head.
TARGETS: Final[Mapping[str, list[str]]] = {
    "MixtralForCausalLM": _ATTENTION,
    "Qwen3MoeForCausalLM": _ATTENTION,
    "ModernBertForTokenClassification": ["Wqkv", "Wo", "Wi", "head.dense"],
    "XLMRobertaForTokenClassification": ["query", "key", "value", "dense"],
    "EsmForTokenClassification": ["query", "key", "value", "dense"],
    "DistilBertForSequenceClassification": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
}


def make_model(place: Path, task: str, config_class: str, values: Mapping[str, Any]) -> Path:
    """Write a model with random weights to the directory `place`."""
    import torch
    import transformers

    config = getattr(transformers, config_class)(**values)
    config.initializer_range = 0.15
    torch.manual_seed(0)
    auto = getattr(transformers, TASK_TABLE[task].auto_class)
    auto.from_config(config).eval().save_pretrained(place)
    return place
