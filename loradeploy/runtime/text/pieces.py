"""Decode a stream of tokens to text, piece by piece.

The concatenated pieces equal the decoded stream, even if it is not valid UTF-8. A piece is returned
only when later tokens cannot change it, which depends on the tokenizer's decoder:

ByteLevel       (GPT-2, Llama 3, Qwen) the bytes of all tokens are UTF-8: up to three bytes wait
ByteFallback    (Llama 2, Mistral, Gemma) consecutive byte tokens are decoded as UTF-8 together, or
                give a replacement character per byte: they wait for a token that is not a byte
one by one      (WordPiece, Metaspace) each token is decoded alone; only the first may differ
any other       the text waits for the end of the stream

Every token is decoded a bounded number of times: the time is linear in the length of the stream.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from typing import Any, Final, Protocol

from loradeploy.bundle.text.tokenizer import Tokenizer

# The tokens that ByteFallback of `tokenizers` takes for bytes.
_BYTE: Final = re.compile(r"<0x[0-9A-Fa-f+][0-9A-Fa-f]>")
# Each token is decoded alone; the first one of a text may lose a space.
_ONE_BY_ONE: Final = ("Metaspace", "WordPiece")
# Maximum spaces removed from the beginning of a text; the text that is decoded twice is as long.
_STRIPPED: Final = 4


class _Strategy(Protocol):
    def push(self, token: int, word: str) -> str:
        """The text that later tokens cannot change; `word` is `token` in the vocabulary."""

    def pending(self) -> str:
        """The remaining text, if no more tokens follow."""

    def close(self) -> str:
        """End the stream and return the remaining text."""


class PieceDecoder:
    """Decodes a stream of tokens; the concatenated pieces are the whole text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._strategy = _strategy(tokenizer)

    def push(self, token: int) -> str:
        """Add a token, and return the text that is complete with it, possibly empty."""
        word = self._tokenizer.word(token)
        return "" if word is None else self._strategy.push(token, word)

    def pending(self) -> str:
        """The remaining text if no token follows, without bytes of incomplete characters."""
        return self._strategy.pending()

    def close(self) -> str:
        """End the stream and return the remaining text."""
        return self._strategy.close()


class _Bytes:
    """ByteLevel: decodes the bytes of each token incrementally."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int, word: str) -> str:
        try:
            data = bytes(_BYTE_OF[character] for character in word)
        except KeyError:  # an added token
            data = word.encode("utf-8", "surrogatepass")
        return self._decoder.decode(data)

    def pending(self) -> str:
        return ""

    def close(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class _Context:
    """Decodes recent tokens without and with the new ones; the difference is the new text.

    `in_runs`: whether consecutive byte tokens are decoded together. Earlier tokens are kept until
    those after them decode to some text, so that rules for the beginning of a text apply to them.
    """

    def __init__(self, tokenizer: Tokenizer, *, in_runs: bool) -> None:
        self._tokenizer = tokenizer
        self._in_runs = in_runs
        self._ids: list[int] = []  # recent tokens
        self._emitted = 0  # number of tokens whose text was returned
        self._next = 0  # tokens to drop once those after it decode to some text

    def push(self, token: int, word: str) -> str:
        self._ids.append(token)
        return "" if self._in_runs and _BYTE.fullmatch(word) else self.close()

    def pending(self) -> str:
        if self._emitted == len(self._ids):
            return ""
        before = self._tokenizer.decode(self._ids[: self._emitted])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def close(self) -> str:
        if self._emitted == len(self._ids):
            return ""
        before = self._tokenizer.decode(self._ids[: self._emitted])
        now = self._tokenizer.decode(self._ids)
        emitted, self._emitted = self._emitted, len(self._ids)
        if self._next == 0:
            self._next = emitted
        if self._next and self._tokenizer.decode(self._ids[self._next :]):
            del self._ids[: self._next]
            self._emitted, self._next = len(self._ids), 0
        return now[len(before) :]


class _Whole:
    """An unknown decoder: returns all text at the end."""

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


def _strategy(tokenizer: Tokenizer) -> _Strategy:
    steps = _steps(tokenizer.decoder)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _Bytes()
    if _is_local(steps):
        return _Context(tokenizer, in_runs="ByteFallback" in kinds)
    return _Whole(tokenizer)


def _steps(decoder: str | None) -> list[Mapping[str, Any]]:
    """The decoder's steps, in order; empty if tokens are joined by spaces."""
    if decoder is None:
        return []
    parsed = json.loads(decoder)
    if parsed.get("type") != "Sequence":
        return [parsed]
    return [inner for step in parsed["decoders"] for inner in _steps(json.dumps(step))]


def _is_local(steps: list[Mapping[str, Any]]) -> bool:
    """Whether later tokens do not change earlier text, except for consecutive byte tokens."""
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
            # Before Fuse, it must not turn a word into a byte; after it, its pattern must not span
            # tokens.
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
    """GPT-2's characters for bytes: printable bytes are themselves."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in seen)
    return {chr(byte): byte for byte in seen} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF: Final = _byte_of()
