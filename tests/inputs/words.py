"""A tokenizer with a vocabulary of numbered words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = 60


def write_tokenizer(
    place: Path, *, words: int = WORDS, template: str | None = None, **tokens: str
) -> Any:
    """Write and return a tokenizer of `words` words, of which four are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(words - 4))]
    ids = {word: index for index, word in enumerate(vocabulary)}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    own = PreTrainedTokenizerFast(tokenizer_object=made, **{**roles, **tokens})
    if template is not None:
        own.chat_template = template
    own.save_pretrained(place)
    return own
