"""Tiny models with random weights and a tokenizer trained on BBC News."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# A chat template in the style of ChatML.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tiny_tokenizer(news: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(f) for f in sorted(news.glob("*/00*.txt"))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=128,
    )


def _tiny_config(name: str) -> Any:
    from transformers import BertConfig, GPT2Config, LlamaConfig, T5Config, WhisperConfig

    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 512}
    if name == "llama":  # grouped-query attention, untied head
        return LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            initializer_range=0.2,
            **tokens,
        )
    if name == "gpt2":  # Conv1D layers, learned positions, tied head
        return GPT2Config(
            n_embd=48, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2, **tokens
        )
    if name == "t5":  # an encoder-decoder, relative positions, tied head
        return T5Config(
            d_model=48,
            d_kv=12,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
            initializer_factor=1.5,
            **tokens,
        )
    if name == "whisper":  # windows of one second, 8 mel bands
        return WhisperConfig(
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=50,
            max_target_positions=28,
            num_mel_bins=8,
            init_std=0.3,
            **{**tokens, "vocab_size": 512 + len(_SPEECH_WORDS), "eos_token_id": 512},
            decoder_start_token_id=513,
        )
    return BertConfig(  # an encoder without a classifier
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        vocab_size=512,
    )


# Special tokens after the words of Whisper's vocabulary; timestamps within one second come last.
_SPEECH_WORDS = (
    *("<|end|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>"),
    *("<|transcribe|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
    *(f"<|{time / 50:.2f}|>" for time in range(51)),
)


def make_tiny_whisper(place: Path, news: Path, *, seconds: int = 1, mels: int = 8) -> None:
    """Write a Whisper with random weights and the settings of a released checkpoint.

    `seconds`: of a window.
    """
    import torch
    from tokenizers import AddedToken
    from transformers import (
        GenerationConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    torch.manual_seed(0)
    config = _tiny_config("whisper")
    config.max_source_positions, config.num_mel_bins = 50 * seconds, mels
    model = WhisperForConditionalGeneration(config).eval()
    known = {word: number for number, word in enumerate(_SPEECH_WORDS, start=512)}
    model.generation_config = GenerationConfig(
        decoder_start_token_id=513,
        eos_token_id=512,
        pad_token_id=512,
        bos_token_id=512,
        lang_to_id={word: known[word] for word in ("<|en|>", "<|de|>")},
        task_to_id={name: known[f"<|{name}|>"] for name in ("translate", "transcribe")},
        no_timestamps_token_id=known["<|notimestamps|>"],
        is_multilingual=True,
        max_initial_timestamp_index=25,
        max_length=28,
        suppress_tokens=[7, 8, 9, *range(513, 520)],
        begin_suppress_tokens=[220, 512],
    )
    model.save_pretrained(place)
    tokenizer = _tiny_tokenizer(news)
    tokenizer.add_tokens([AddedToken(w, special=w[2] not in "0123") for w in _SPEECH_WORDS])
    tokenizer.eos_token = _SPEECH_WORDS[0]
    tokenizer.save_pretrained(place)
    WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds).save_pretrained(place)


def make_tiny(name: str, place: Path, news: Path) -> None:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    kinds = {"bert": AutoModel, "t5": AutoModelForSeq2SeqLM}
    kind = kinds.get(name, AutoModelForCausalLM)
    kind.from_config(_tiny_config(name)).eval().save_pretrained(place)
    _tiny_tokenizer(news).save_pretrained(place)
