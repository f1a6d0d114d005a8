"""The token that fills a batch up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loradeploy.lora.quiet import quiet


def pad_token(directory: Path, config: Any) -> int:
    """The padding token of the checkpoint in `directory`, chosen as in training.

    The config's, else its tokenizer's, else the token that ends a text, else 0. A classifier on a
    decoder looks for the last token that is another one, so all must agree on it.
    """
    tokens = [config.get_text_config().pad_token_id]
    if tokens[0] is None:
        tokens += _of_tokenizer(directory)
    return next((int(token) for token in tokens if token is not None), 0)


def _of_tokenizer(directory: Path) -> list[int | None]:
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception:  # there is none, or none that transformers can read
        return []
    return [tokenizer.pad_token_id, tokenizer.eos_token_id]
