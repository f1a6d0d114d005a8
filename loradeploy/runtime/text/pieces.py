"""Text from tokens that arrive one by one.

The pieces of a stream together are what the whole stream decodes to, bytes that are no UTF-8
included. So a piece is given out only where nothing that may follow changes it, which depends on
how the tokenizer makes text of tokens:

ByteLevel       (GPT-2, Llama 3, Qwen) the bytes of all tokens as UTF-8: up to three bytes wait
ByteFallback    (Llama 2, Mistral, Gemma) bytes in a row are UTF-8 as a whole or a replacement
                character each: they wait for the first token that is none
one by one      (WordPiece, Metaspace) each token for itself; the first may be told otherwise
any other       the text waits for the end of the stream

Every token is decoded a bounded number of times: a stream takes time linear in its length.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from typing import Any, Final, Protocol

from loradeploy.bundle.text.tokenizer import Tokenizer

# What the library's ByteFallback takes for a byte.
_BYTE: Final = re.compile(r"<0x[0-9A-Fa-f+][0-9A-Fa-f]>")
# Each token for itself; the first one of a text may lose a space.
_ONE_BY_ONE: Final = ("Metaspace", "WordPiece")
# Spaces that the beginning of a text may lose; what is decoded twice is as long.
_STRIPPED: Final = 4


class _Way(Protocol):
    def push(self, token: int, word: str) -> str:
        """The text that is final with `token`, which is `word` in the vocabulary."""

    def pending(self) -> str:
        """The rest, if the tokens ended here."""

    def close(self) -> str:
        """The rest."""


class PieceDecoder:
    """Text from tokens that arrive one by one; the pieces together are the whole text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._way = _way(tokenizer)

    def push(self, token: int) -> str:
        """The text that is complete with `token`, perhaps none."""
        word = self._tokenizer.word(token)
        return "" if word is None else self._way.push(token, word)

    def pending(self) -> str:
        """The text that waits, as it is if no token follows; bytes of no character are left out."""
        return self._way.pending()

    def close(self) -> str:
        """The text that was held back."""
        return self._way.close()


class _Bytes:
    """ByteLevel: the bytes of each token, decoded as they come."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int, word: str) -> str:
        try:
            data = bytes(_BYTE_OF[character] for character in word)
        except KeyError:  # a word that was added as text
            data = word.encode("utf-8", "surrogatepass")
        return self._decoder.decode(data)

    def pending(self) -> str:
        return ""

    def close(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class _Context:
    """Tokens decoded twice, without and with the new ones; what they add to the text is told.

    `in_runs`: bytes in a row are decoded together. The tokens before the new ones are as many as
    decode to some text, so that what is done to the beginning of a text is done to them.
    """

    def __init__(self, tokenizer: Tokenizer, *, in_runs: bool) -> None:
        self._tokenizer = tokenizer
        self._in_runs = in_runs
        self._ids: list[int] = []  # from where decoding begins
        self._told = 0  # the text of the tokens before this one was given out
        self._next = 0  # where decoding may begin once what is told behind it has a text

    def push(self, token: int, word: str) -> str:
        self._ids.append(token)
        return "" if self._in_runs and _BYTE.fullmatch(word) else self.close()

    def pending(self) -> str:
        if self._told == len(self._ids):
            return ""
        before = self._tokenizer.decode(self._ids[: self._told])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def close(self) -> str:
        if self._told == len(self._ids):
            return ""
        before = self._tokenizer.decode(self._ids[: self._told])
        now = self._tokenizer.decode(self._ids)
        told, self._told = self._told, len(self._ids)
        if self._next == 0:
            self._next = told
        if self._next and self._tokenizer.decode(self._ids[self._next :]):
            del self._ids[: self._next]
            self._told, self._next = len(self._ids), 0
        return now[len(before) :]


class _Whole:
    """A way of decoding that is not known: all of it at the end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def push(self, token: int, word: str) -> str:
        self._ids.append(token)
        return ""

    def pending(self) -> str:
        return self._tokenizer.decode(self._ids)

    def close(self) -> str:
        text = self._tokenizer.decode(self._ids)
        self._ids.clear()
        return text


def _way(tokenizer: Tokenizer) -> _Way:
    steps = _steps(tokenizer.decoder)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _Bytes()
    if _is_local(steps):
        return _Context(tokenizer, in_runs="ByteFallback" in kinds)
    return _Whole(tokenizer)


def _steps(decoder: str | None) -> list[Mapping[str, Any]]:
    """The decoder's steps, in order; none where tokens are joined by spaces."""
    if decoder is None:
        return []
    told = json.loads(decoder)
    if told.get("type") != "Sequence":
        return [told]
    return [inner for step in told["decoders"] for inner in _steps(json.dumps(step))]


def _is_local(steps: list[Mapping[str, Any]]) -> bool:
    """Whether more tokens leave the text of those before as it is, but for bytes in a row."""
    fused = False
    to_come = [step.get("type") for step in steps]
    for step in steps:
        kind = to_come.pop(0)
        if kind == "Fuse":
            fused = True
        elif kind == "ByteFallback":
            if fused:
                return False
        elif kind == "Replace":
            # Of tokens: no byte is made of a word. Of the whole text: no pattern spans two tokens.
            pattern, by = step["pattern"].get("String"), step["content"]
            if "ByteFallback" in to_come and (pattern is None or by != " "):
                return False
            if fused and (pattern is None or len(pattern) != 1):
                return False
        elif kind == "Strip":
            if "ByteFallback" in to_come or (fused and (step["stop"] or step["start"] > _STRIPPED)):
                return False
        elif kind not in _ONE_BY_ONE or fused or "ByteFallback" in to_come:
            return False
    return True


def _byte_of() -> dict[str, int]:
    """GPT-2's characters for bytes: those that can be seen are themselves."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in seen)
    return {chr(byte): byte for byte in seen} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF: Final = _byte_of()
