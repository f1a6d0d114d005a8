"""Streaming: the pieces of a text joined equal its decoded tokens, for any tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Fast

from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import BundleError
from loradeploy.runtime.text import pieces as module
from loradeploy.runtime.text.pieces import PieceDecoder

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁▁", "▁a", "a", "▁b▁", "k", "é", "東", "\ufffd", "\ufffdx", " ", "."]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def _words(decoder: Any, words: Sequence[str] = (*BYTES, *WORDS)) -> Fast:
    vocabulary = {word: index for index, word in enumerate(("<unk>", *words))}
    tokenizer = Fast(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def _byte_level() -> Fast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Two words of complete characters, and one that starts and ends in the middle of characters.
    return _words(decoders.ByteLevel(), [*alphabet, "Ġa", "æĿ±", "Ŀ±æ", "not of the alphabet: 東"])


def _unigram() -> Fast:
    tokenizer = Fast(models.Unigram([("<unk>", 0.0), *((w, -1.0) for w in WORDS)], unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _word_piece() -> Fast:
    words = ["a", "##b", "##", "b", ".", "'", "##.", "東", "do", "not", "n't", "##\ufffd", "[X]"]
    tokenizer = Fast(
        models.WordPiece({w: n for n, w in enumerate(["[UNK]", *words])}, unk_token="[UNK]")
    )
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


KINDS: dict[str, Callable[[], Fast]] = {
    "byte-level": _byte_level,
    "llama": lambda: _words(decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)])),
    "gemma": lambda: _words(decoders.Sequence(LLAMA)),
    "three spaces": lambda: _words(decoders.Sequence([*LLAMA, decoders.Strip(" ", 3, 0)])),
    "bytes, metaspace": lambda: _words(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    ),
    "unigram": _unigram,
    "WordPiece": _word_piece,
    "no decoder": lambda: _words(None),
    # Decoders for which the text of a token depends on the following tokens.
    "ends stripped": lambda: _words(decoders.Sequence([*LLAMA, decoders.Strip(" ", 0, 2)])),
    "pairs replaced": lambda: _words(decoders.Sequence([*LLAMA, decoders.Replace("aa", "k")])),
    "bytes made": lambda: _words(decoders.Sequence([decoders.Replace("k", "<0xE6>"), *LLAMA[1:]])),
    "CTC": lambda: _words(decoders.CTC(pad_token="a", word_delimiter_token="▁")),
    "BPE with ends": lambda: _words(decoders.BPEDecoder(suffix="a")),
}
STREAMED = ("byte-level", "llama", "gemma", "unigram", "WordPiece", "no decoder")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return _saved(request.param, tmp_path_factory.mktemp("tokenizer"))


def _saved(kind: str, place: Path) -> Tokenizer:
    made = KINDS[kind]()
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    made.add_tokens([AddedToken("<|tool|>"), AddedToken("▁added words")])
    made.save(str(place / "tokenizer.json"))
    return Tokenizer(place)


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    decoder = PieceDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.close()]


# Bytes of every kind: characters of two to four bytes, truncated, overlong, surrogates, not UTF-8.
@given(data=st.data())
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_pieces_of_random_tokens_are_the_whole_text(tokenizer: Tokenizer, data: Any) -> None:
    size = len(tokenizer.vocabulary)
    token = st.integers(0, size + 3)  # ids beyond the vocabulary have no text
    last = st.integers(max(0, size - 16), size - 1)  # words and added tokens as often as bytes
    ids = data.draw(st.lists(token | last, max_size=40))
    try:
        whole = tokenizer.decode(ids)
    except BundleError:  # tokenizers panics if it has to strip more than there is
        with pytest.raises(BundleError):
            _pieces(tokenizer, ids)
    else:
        assert "".join(_pieces(tokenizer, ids)) == whole


@given(raw=st.binary(max_size=24) | st.text(max_size=8).map(lambda text: text.encode()))
@settings(max_examples=100, deadline=None, derandomize=True)
@pytest.mark.parametrize("kind", ["byte-level", "gemma"])
def test_pieces_of_any_bytes_are_the_whole_text(
    kind: str, raw: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = _BYTE_TOKENIZERS.get(kind)
    if tokenizer is None:
        tokenizer = _BYTE_TOKENIZERS[kind] = _saved(kind, tmp_path_factory.mktemp(kind))
    spelled = {byte: character for character, byte in module._BYTE_OF.items()}
    words = [spelled[byte] if kind == "byte-level" else BYTES[byte] for byte in raw]
    ids = [tokenizer.vocabulary[word] for word in words]
    assert "".join(_pieces(tokenizer, ids)) == tokenizer.decode(ids)
    if kind == "byte-level":
        assert tokenizer.decode(ids) == raw.decode("utf-8", "replace")


_BYTE_TOKENIZERS: dict[str, Tokenizer] = {}


@pytest.mark.parametrize("kind", STREAMED)
def test_words_are_emitted_immediately(kind: str, tmp_path: Path) -> None:
    tokenizer = _saved(kind, tmp_path)
    word = tokenizer.vocabulary["a" if kind != "byte-level" else "Ġa"]
    for piece in _pieces(tokenizer, [word] * 4)[:-1]:
        assert piece.strip() == "a"


def test_a_byte_is_held_back_until_its_character_is_known(tmp_path: Path) -> None:
    tokenizer = _saved("gemma", tmp_path)
    newline, half, k = (tokenizer.vocabulary[word] for word in ("<0x0A>", "<0xC3>", "k"))
    assert _pieces(tokenizer, [newline, k]) == ["", "\nk", ""]
    assert _pieces(tokenizer, [newline, half, k]) == ["", "", "\ufffd\ufffdk", ""]
    assert _pieces(tokenizer, [newline]) == ["", "\n"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_time_of_a_stream_is_linear_in_its_length(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured in decoded tokens: a few per token, for any length of the stream."""
    tokenizer = _saved(kind, tmp_path)
    decoded: list[int] = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    for word in ("k", "▁", "\ufffd", "<0xFF>", "ÿ", "##", "東", "<|end|>"):
        if (token := tokenizer.vocabulary.get(word)) is None:
            continue
        ids = [token] * 300
        decoded.clear()
        message = _pieces(tokenizer, ids)
        assert sum(decoded) <= 20 * len(ids), f"{word!r}: {sum(decoded)} tokens were decoded"
        assert "".join(message) == decode(tokenizer, ids)
