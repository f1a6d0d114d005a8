"""Adds special tokens around pairs of texts to the tokenizers of the tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors

NAMES: Final = ["input_ids", "token_type_ids", "attention_mask"]
BERT: Final = processors.BertProcessing(("<|im_end|>", 2), ("<|im_start|>", 1))


def give_rules(place: Path, around: Any = BERT, **settings: Any) -> Path:
    """Change the tokenizer in `place` to put the special tokens `around` texts, with `settings`."""
    if around is not None:
        tokenizer = FastTokenizer.from_file(str(place / "tokenizer.json"))
        tokenizer.post_processor = around
        tokenizer.save(str(place / "tokenizer.json"))
    file = place / "tokenizer_config.json"
    known = json.loads(file.read_text()) | {"model_input_names": NAMES}
    file.write_text(json.dumps(known | settings))
    return place
