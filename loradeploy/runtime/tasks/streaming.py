"""Stream texts while they are generated."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loradeploy.runtime.tasks.generation import Generation

# From a set of rows to cancel, which is read before each step, to an iterator of pieces.
Pieces = Callable[[set[int]], "Generator[TextPiece]"]


@dataclass(frozen=True)
class TextPiece:
    """A final part of a text.

    Args:
        row: index of the text, in the order of `TextGenerator.generate`'s results.
        text: the new text. The pieces of a row add up to its text, and contain no part of a stop
            string.
        result: the complete result, with the last piece of the row.
    """

    row: int
    text: str
    result: Generation | None = None


class TextStream:
    """The pieces of texts while they are generated, for a `for` loop.

    The adapters are in use until the last piece, or `close`, or the end of its `with`.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._cancelled: set[int] = set()
        self._pieces = pieces(self._cancelled)

    def __iter__(self) -> Iterator[TextPiece]:
        return self

    def __next__(self) -> TextPiece:
        return next(self._pieces)

    def cancel(self, row: int) -> None:
        """End a row before its next token, as "cancelled"; the others continue.

        The rows of a beam search end together.
        """
        self._cancelled.add(row)

    def close(self) -> None:
        """End all rows."""
        self._pieces.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
