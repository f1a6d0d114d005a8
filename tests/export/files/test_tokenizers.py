"""The tokenizer.json of a bundle gives the same tokens as transformers with all tokenizer files."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, Final

import pytest

from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import ExportError
from loradeploy.export.files.tokenizers import correct_tokenizer, corrected_tokenizer

_TEXTS: Final = (
    "Hello World",
    "hello <|end|> world",
    "Été 中文",
    " world",
    "x",
    "a <|endoftext|>b",
)
_ROLES: Final = ("pad", "unk", "cls", "sep", "mask")
_BERT: Final = {"tokenizer_class": "BertTokenizer", "do_lower_case": True} | {
    f"{role}_token": f"[{role.upper()}]" for role in _ROLES
}
_GPT2: Final = {"tokenizer_class": "GPT2Tokenizer"}
_PLAIN: Final = {"tokenizer_class": "PreTrainedTokenizerFast"}
_END: Final = {"content": "<|end|>", "special": True, "normalized": False} | dict.fromkeys(
    ("lstrip", "rstrip", "single_word"), False
)
_WORD: Final = _END | {"content": "<|endoftext|>", "single_word": True}


def _bert(place: Path) -> None:
    """Write a WordPiece tokenizer of few words; its tokenizer.json lowercases."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *("hello", "Hello", "world", "World"))
    words = (*words, *("ete", "été", "Été", "Ete", "中", "文", "中文", "x"))
    made = Library(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made.save(str(place / "tokenizer.json"))


def _bpe(place: Path) -> None:
    """Write a byte-level tokenizer; its tokenizer.json adds no space before a text."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["Hello World hello world"] * 9, trainer)
    made.save(str(place / "tokenizer.json"))


@pytest.mark.parametrize(
    ("make", "settings", "added", "differs"),
    [
        (_bert, _BERT, {}, False),
        (_bert, _BERT | {"do_lower_case": False}, {}, True),
        (_bert, _BERT | {"strip_accents": False}, {}, True),
        (_bert, _BERT | {"tokenize_chinese_chars": False}, {}, True),
        (_bpe, _GPT2, {}, False),
        (_bpe, _GPT2 | {"add_prefix_space": True}, {}, True),
        (_bpe, _PLAIN | {"added_tokens_decoder": {"300": _END}}, {}, True),
        (_bpe, _PLAIN, {"<|end|>": 300}, True),
        (_bpe, _PLAIN | {"added_tokens_decoder": {"0": _WORD}}, {}, True),
    ],
    ids=[
        *("as it is", "cased", "accents", "chinese", "bytes as they are", "leading space"),
        *("word in the settings", "word in a file", "word between spaces alone"),
    ],
)
def test_tokens_are_those_of_transformers_even_where_tokenizer_json_differs(
    make: Any,
    settings: dict[str, Any],
    added: dict[str, int],
    differs: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers import AutoTokenizer

    source, bundle = tmp_path / "model", tmp_path / "bundle"
    source.mkdir()
    make(source)
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    if added:
        (source / "added_tokens.json").write_text(json.dumps(added))
    shutil.copytree(source, bundle)
    theirs = AutoTokenizer.from_pretrained(source)
    expected = [theirs(text)["input_ids"] for text in _TEXTS]
    before = [Tokenizer(bundle).encode(text) for text in _TEXTS]
    assert (before != expected) is differs
    with caplog.at_level(logging.WARNING):
        correct_tokenizer(source, bundle, vocabulary=1000)
    assert [Tokenizer(bundle).encode(text) for text in _TEXTS] == expected
    again = AutoTokenizer.from_pretrained(bundle)
    assert [again(text)["input_ids"] for text in _TEXTS] == expected
    same = (source / "tokenizer.json").read_bytes() == (bundle / "tokenizer.json").read_bytes()
    assert same is not differs
    assert any("makes other tokens of" in r.message for r in caplog.records) is differs


def test_a_word_without_an_embedding_row_is_not_a_difference(tmp_path: Path) -> None:
    _bpe(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(_PLAIN | {"pad_token": "[PAD]"}))
    before = (tmp_path / "tokenizer.json").read_bytes()
    rows = len(Tokenizer(tmp_path).vocabulary)
    correct_tokenizer(tmp_path, tmp_path, vocabulary=rows)
    assert (tmp_path / "tokenizer.json").read_bytes() == before


def test_a_tokenizer_that_transformers_cannot_read_is_not_changed(tmp_path: Path) -> None:
    _bpe(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer_config.json").write_text("[]")
    correct_tokenizer(tmp_path, tmp_path, vocabulary=300)
    assert (tmp_path / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize("lowercase", [False, True])
def test_a_tokenizer_with_python_rules_is_refused_if_tokenizer_json_differs(
    lowercase: bool, tmp_path: Path
) -> None:
    from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    # ByT5's Python class: one token per byte, and an end token.
    letters = bytes_to_unicode().items()
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {letter: 3 + byte for byte, letter in letters}
    made = Library(models.WordLevel(words, unk_token="<unk>"))
    if lowercase:
        made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex("."), "isolated"),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "ByT5Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if lowercase:
        with pytest.raises(ExportError, match=r"other tokens of .*Hello World.* ByT5Tokenizer"):
            corrected_tokenizer(tmp_path, 400)
    else:
        assert corrected_tokenizer(tmp_path, 400) is None
