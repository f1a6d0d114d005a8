"""Where a text ends before its tokens do: stop strings, across the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.runtime.text.pieces import PieceDecoder


class Transcript:
    """The text of tokens that come one by one, up to the first stop string.

    `stopped_by`: the stop string that was found; of several with one token, the one that begins
    first. The pieces that `push` and `close` give out are `text` together: an end of the text that
    may be the beginning of a stop string waits.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._pieces = PieceDecoder(tokenizer)
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._given = 0
        self.text = ""
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """The text that is final with `token`, perhaps none."""
        searched = max(0, len(self.text) - self._longest + 1)
        self.text += self._pieces.push(token)
        if self._stops:
            known = self.text + self._pieces.pending()
            found = first_stop(known, self._stops, searched)
            if found is not None:
                begin, self.stopped_by = found
                self.text = known[:begin]
                return self._give(begin)
        return self._give(len(self.text) - self._waiting())

    def close(self) -> str:
        """The rest of the text."""
        if self.stopped_by is None:
            self.text += self._pieces.close()
        return self._give(len(self.text))

    def _give(self, end: int) -> str:
        piece, self._given = self.text[self._given : end], end
        return piece

    def _waiting(self) -> int:
        """How much of the end of the text is the beginning of a stop string."""
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
    """Where the first of `stops` in `text` begins, looked for from `start` on, and which it is."""
    found = [(at, stop) for stop in stops if (at := text.find(stop, start)) >= 0]
    return min(found, key=lambda hit: (hit[0], -len(hit[1])), default=None)
