"""Tokenization of text pairs equals that of transformers' fast tokenizers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from loradeploy.bundle.text.pairs import pair_tokens
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import BundleError, UsageError
from tests.inputs.pairs import BERT, NAMES, give_rules

WORDS = "the match was won in extra time and shares fell after the bank said so"
# Special tokens around pairs: of BERT, of RoBERTa, of a template with types, and none.
AROUND: dict[str, Any] = {
    "bert": BERT,
    "roberta": processors.RobertaProcessing(("<|im_end|>", 2), ("<|im_start|>", 1)),
    "template": processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A:0 <|im_end|> <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    ),
    "nothing": None,
}


def with_rules(model: Path, place: Path, around: Any, **settings: Any) -> Path:
    """Copy the tokenizer files of `model` with the special tokens `around` and `settings`."""
    place.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, place / name)
    return give_rules(place, around, **settings)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("around", AROUND)
def test_a_pair_is_encoded_and_truncated_like_in_transformers(
    around: str, side: str, tiny_bert: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    place = with_rules(tiny_bert, tmp_path / "own", AROUND[around], truncation_side=side)
    ours, theirs = Tokenizer(place), AutoTokenizer.from_pretrained(place)
    words = WORDS.split()
    for first, second in [(0, 3), (1, 1), (2, 14), (14, 2), (9, 10), (14, 14), (3, 0)]:
        text, pair = " ".join(words[:first]), " ".join(words[-second:] if second else [])
        for longest in (6, 7, 8, 13, 21, 200):
            # As a batch: transformers treats a single empty second text as no pair.
            expected = theirs([text], [pair], truncation="longest_first", max_length=longest)
            found = pair_tokens(ours, text, pair, max_length=longest)
            assert list(found.ids) == expected["input_ids"][0], (first, second, longest)
            assert found.types == expected["token_type_ids"][0], (first, second, longest)
    whole = pair_tokens(ours, WORDS, WORDS, max_length=None)
    assert list(whole.ids) == theirs(WORDS, WORDS)["input_ids"]
    assert whole.types == theirs(WORDS, WORDS)["token_type_ids"]
    assert (1 in whole.types) == (around != "roberta")


def test_token_types_are_those_that_the_tokenizers_files_declare(
    tiny_bert: Path, tmp_path: Path
) -> None:
    bert, names = AROUND["bert"], NAMES[::2]
    without = with_rules(tiny_bert, tmp_path / "without", bert, model_input_names=names)
    silent = with_rules(tiny_bert, tmp_path / "silent", bert, model_input_names=None)
    assert pair_tokens(Tokenizer(without), "a", "b", max_length=None).types is None
    with pytest.raises(BundleError, match="no `model_input_names`.*export again"):
        pair_tokens(Tokenizer(silent), "a", "b", max_length=None)
    assert pair_tokens(Tokenizer(silent), "a", "b", max_length=None, typed=False).types is None
    base = Tokenizer(with_rules(tiny_bert, tmp_path / "base", bert))
    assert pair_tokens(Tokenizer(silent, base), "a", "b", max_length=None).types is not None


def test_a_pair_needs_room_beside_its_special_tokens(tiny_bert: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(with_rules(tiny_bert, tmp_path / "own", AROUND["bert"]))
    with pytest.raises(UsageError, match="3 special tokens, and the model takes 3"):
        pair_tokens(tokenizer, "a", "b", max_length=3)
