"""Stop strings, which may begin and end inside tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import UsageError, shown
from loradeploy.runtime.text.pieces import PieceDecoder


@dataclass(frozen=True)
class Stops:
    """The stop strings of a text.

    `texts`: those that are searched in the text. `tokens`: those that are special tokens, by token.
    Special tokens have no text.
    """

    texts: tuple[str, ...] = ()
    tokens: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Sequence[str], tokenizer: Tokenizer, what: str) -> Stops:
        """The stop strings `given`. `what`: the prompt's name in messages.

        Raises:
            UsageError: one has a special token beside other text, and would never be found.
        """
        tokens = {}
        for stop in given:
            inside = [word for word in tokenizer.special_words if word in stop]
            if stop in inside:
                tokens[tokenizer.vocabulary[stop]] = stop
            elif inside:
                raise UsageError(
                    f"{what}: the stop string {shown(stop)} contains the special token"
                    f" {max(inside, key=len)}, which is not part of a text: give the token alone"
                )
        return cls(tuple(given), tokens)


class Transcript:
    """The text of a stream of tokens, up to the first stop string.

    `stopped_by`: the stop string that was found; if one token completes several, the one that
    begins first. The concatenated results of `push` and `close` are `text`: the end of a text that
    may be the beginning of a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._pieces = PieceDecoder(tokenizer)
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._released = 0
        self.text = ""
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """Add a token, and return the text that is final with it, possibly empty."""
        searched = max(0, len(self.text) - self._longest + 1)
        self.text += self._pieces.push(token)
        if self._stops:
            known = self.text + self._pieces.pending()
            found = first_stop(known, self._stops, searched)
            if found is not None:
                begin, self.stopped_by = found
                self.text = known[:begin]
                return self._release(begin)
        return self._release(len(self.text) - self._held_back())

    def close(self) -> str:
        """End the stream, and return the remaining text."""
        if self.stopped_by is None:
            self.text += self._pieces.close()
        return self._release(len(self.text))

    def _release(self, end: int) -> str:
        piece, self._released = self.text[self._released : end], end
        return piece

    def _held_back(self) -> int:
        """The number of characters at the end that may begin a stop string."""
        return max(
            (
                size
                for stop in self._stops
                for size in range(1, min(len(stop), len(self.text) + 1))
                if self.text.endswith(stop[:size])
            ),
            default=0,
        )


def first_stop(text: str, stops: Sequence[str], start: int = 0) -> tuple[int, str] | None:
    """The position and the string of the first of `stops` in `text` from `start` on."""
    found = [(at, stop) for stop in stops if (at := text.find(stop, start)) >= 0]
    return min(found, key=lambda hit: (hit[0], -len(hit[1])), default=None)
