"""Random tiny decoders and adapters: odd sizes, windows, scaled rotations, trained everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any, Final

Values = dict[str, Any]
VOCABULARY: Final = 97
_TOKENS: Final = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _yes(random: Random) -> bool:
    return random.random() < 0.5


def _sizes(random: Random, *, own_head: bool) -> Values:
    """Numbers of heads that are no powers of two, and head sizes that do not divide the width."""
    heads = random.choice([2, 3, 4, 5, 6])
    size = random.choice([6, 8, 10, 16])
    groups = random.choice([n for n in range(1, heads + 1) if heads % n == 0])
    width = heads * (random.choice([4, 7, 9]) if own_head else size)
    return {
        **_TOKENS,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_hidden_layers": 2,
        "intermediate_size": random.choice([20, 33, 48]),
        "max_position_embeddings": 64,
        "tie_word_embeddings": _yes(random),
        **({"head_dim": size} if own_head else {}),
    }


def _rotation(random: Random) -> Values:
    kinds: list[Values] = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ]
    theta = random.choice([100.0, 10000.0])
    return {"rope_parameters": {"rope_theta": theta, **random.choice(kinds)}}


def _window(random: Random) -> Values:
    return {"sliding_window": random.choice([1, 2, 3, 5])}


def _layers(random: Random) -> Values:
    kinds = ["sliding_attention", "full_attention"]
    return {**_window(random), "layer_types": [random.choice(kinds) for _ in range(2)]}


def _llama(random: Random) -> Values:
    own = {"attention_bias": _yes(random), "mlp_bias": _yes(random)}
    return {**_sizes(random, own_head=True), **_rotation(random), **own}


def _mistral(random: Random) -> Values:
    return {**_sizes(random, own_head=True), **_rotation(random), **_window(random)}


def _qwen3(random: Random) -> Values:
    own = {"attention_bias": _yes(random), "use_sliding_window": True, "max_window_layers": 1}
    return {**_sizes(random, own_head=True), **_rotation(random), **_window(random), **own}


def _gemma3(random: Random) -> Values:
    own = {"query_pre_attn_scalar": 7, "final_logit_softcapping": random.choice([None, 3.0])}
    return {**_sizes(random, own_head=True), **_layers(random), **own}


def _granite(random: Random) -> Values:
    own = {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.22}
    sizes = _sizes(random, own_head=False)
    return {**sizes, **_rotation(random), **own, "attention_multiplier": 0.1}


def _olmo2(random: Random) -> Values:
    return {**_sizes(random, own_head=False), **_rotation(random), "attention_bias": _yes(random)}


def _gpt_neox(random: Random) -> Values:
    sizes = {**_sizes(random, own_head=False), "use_parallel_residual": _yes(random)}
    turned = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    heads = {"hidden_size": 48, "num_attention_heads": random.choice([3, 6])}
    return {**sizes, **heads, "rope_parameters": turned, "attention_bias": _yes(random)}


def _falcon(random: Random) -> Values:
    new = _yes(random)
    heads = random.choice([2, 4])
    return {
        **_TOKENS,
        "hidden_size": heads * 16,
        "num_attention_heads": heads,
        "num_kv_heads": random.choice([1, heads]),
        "num_hidden_layers": 2,
        "new_decoder_architecture": new,
        "multi_query": _yes(random),
        "parallel_attn": _yes(random) or new,
        "bias": _yes(random),
        **({"num_ln_in_parallel_attn": 2} if new else {}),
        "max_position_embeddings": 64,
    }


def _bloom(random: Random) -> Values:
    heads = random.choice([2, 3, 5])
    return {**_TOKENS, "hidden_size": heads * 8, "n_head": heads, "n_layer": 2}


_DECODERS: Final[Mapping[str, Callable[[Random], Values]]] = {
    "LlamaConfig": _llama,
    "MistralConfig": _mistral,
    "Qwen3Config": _qwen3,
    "Gemma3TextConfig": _gemma3,
    "GraniteConfig": _granite,
    "Olmo2Config": _olmo2,
    "GPTNeoXConfig": _gpt_neox,
    "FalconConfig": _falcon,
    "BloomConfig": _bloom,
}


def random_decoder(random: Random, place: Path) -> Path:
    """Write a random decoder whose biases and norms are random too: zeros hide mistakes."""
    import torch
    import transformers

    kind = random.choice(sorted(_DECODERS))
    config = getattr(transformers, kind)(**_DECODERS[kind](random))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(random.randrange(1 << 16))
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(values * 0.2)
            else:
                parameter.copy_(values * parameter.shape[-1] ** -0.5)
    model.save_pretrained(place)
    return place


def random_lora(random: Random, model: Path) -> Values:
    """Random options of `random_adapter` for the decoder `model`."""
    import torch
    from transformers import AutoModelForCausalLM

    modules = AutoModelForCausalLM.from_pretrained(model).named_modules()
    linear = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
    names = sorted({n.rpartition(".")[2] for n in linear} - {"lm_head", "embed_out"})
    chosen = random.sample(names, random.randint(1, len(names)))
    options: Values = {
        "r": random.choice([1, 3, 4, 13, 80]),
        "alpha": random.choice([1, 3.5, 16]),
        "seed": random.randrange(1 << 16),
        "scale": 0.3,
        "target_modules": random.choice([chosen, "all-linear"]),
        "use_rslora": _yes(random),
        "use_dora": random.random() < 0.2,
        "bias": random.choice(["none", "none", "lora_only"]),
    }
    if _yes(random):
        options |= {"rank_pattern": {chosen[0]: 2}, "alpha_pattern": {chosen[-1]: 5.5}}
    if options["target_modules"] is chosen and _yes(random):
        options["layers_to_transform"] = [0]
    return options
