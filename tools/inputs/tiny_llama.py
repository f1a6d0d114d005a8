"""Tiny Llamas with random weights, with or without a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path


def random_llama(
    place: Path, *, hidden_size: int = 32, intermediate_size: int = 48, vocab_size: int = 300
) -> Path:
    """Write a Llama of two layers with random weights, always the same, to `place`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        vocab_size=vocab_size,
    )
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(place)
    return place


def tiny_llama(place: Path) -> Path:
    """Write a random Llama with a byte-level tokenizer and a chat template to `place`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    random_llama(place)
    names = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
    ]
    tokenizer = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template="{{ messages[0]['content'] }}",
        model_max_length=128,
    ).save_pretrained(place)
    return place
