"""Protocols of the rows of a batch, for a decoding loop and an engine, with any kind of cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from loradeploy.runtime.adapters.resident import Resident
    from loradeploy.runtime.decoding.graph import NewTokens, TokenEmbeds
    from loradeploy.runtime.running.feeds import Feeds


# The keys and values of a row, [heads, tokens, size] for each tensor of the cache.
Past = Sequence["NDArray[Any]"]


class RowAdapters(Protocol):
    """The adapters of the rows of a batch."""

    def take_rows(self, rows: Sequence[int], /) -> None:
        """Use the adapters of these numbers in later runs, one for each row."""

    def resident(self, number: int, /) -> Resident | None:
        """The adapter of a number; None for the base."""

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        feeds: Feeds,
        *,
        buffers: Mapping[str, onnxruntime.OrtValue] | None = None,
    ) -> list[onnxruntime.OrtValue]:
        """Like `AdapterSession.run_with_ort_values`."""


class Readers(Protocol):
    """Rows, each with the tokens that it has processed."""

    @property
    def count(self) -> int:
        """The number of rows of a run, including unused ones."""

    def read(self, adapters: RowAdapters, new: NewTokens) -> NDArray[Any]:
        """Process `new` and return each row's logits at its last token, [rows, vocabulary]."""


class Rows(Readers, Protocol):
    """The rows of a batch."""

    def move(self, parents: Sequence[int]) -> list[int]:
        """Replace the rows by successors of the rows `parents`, and return where each of them is.

        A row may have several successors, or none.
        """


class Reading(Readers, Protocol):
    """Prompts that are processed beside a batch, one per row, until they `join` it."""

    def load(self, past: Past, /) -> None:
        """Load keys and values into the only row, before it processes anything."""

    def past(self, row: int, /) -> Past:
        """The keys and values of a row."""

    def join(self, rows: Sequence[int], joining: Sequence[int], /) -> list[int]:
        """Continue the batch with its `rows` and with the rows `joining` of this reading.

        Returns where they are. A row of the reading may join several times.
        """

    def close(self) -> None:
        """Release the rows that have not joined."""


class RowsBeside(Protocol):
    """Rows of a batch beside which prompts can be processed."""

    def begin(self, count: int, embeds: Sequence[TokenEmbeds | None] = (), /) -> Reading:
        """Start a reading of `count` prompts, or of fewer if these do not fit in one run.

        `embeds`: for each prompt, embeddings that replace tokens; such a prompt is read in one run.
        """
