"""What a decoding loop and an engine ask of the rows of a batch, whatever keeps their cache.

A run reads `ids` [rows, new]; in each row those count whose `mask` is 1, the last of them at `end`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime
    from numpy.typing import NDArray

    from loradeploy.runtime.adapters.resident import Resident
    from loradeploy.runtime.running.feeds import Feeds


# The keys and values of a row, of each tensor of the cache [heads, tokens, size].
Past = Sequence["NDArray[Any]"]


class RowAdapters(Protocol):
    """The adapters of the rows of a batch."""

    def take_rows(self, rows: Sequence[int], /) -> None:
        """Run from now on with the adapters of these numbers, one a row."""

    def resident(self, number: int, /) -> Resident | None:
        """The adapter of a number; None is the base."""

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        feeds: Feeds,
        *,
        buffers: Mapping[str, onnxruntime.OrtValue] | None = None,
    ) -> list[onnxruntime.OrtValue]:
        """As `AdapterSession.run_with_ort_values`."""


class Readers(Protocol):
    """Rows, each with what it has read."""

    @property
    def count(self) -> int:
        """How many rows a run reads, those that nobody goes on with among them."""

    def read(
        self,
        adapters: RowAdapters,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> NDArray[Any]:
        """Read `ids`: each row's logits at its last token, [rows, vocabulary]."""


class Rows(Readers, Protocol):
    """Rows of a batch."""

    def move(self, parents: Sequence[int]) -> list[int]:
        """Go on with rows that follow the rows `parents`; where each of them is now.

        A row may be followed by several, or by none.
        """


class Reading(Readers, Protocol):
    """Prompts that are read beside a batch, a row each, until they `join` it."""

    def load(self, past: Past, /) -> None:
        """Have the one row hold this before it reads anything."""

    def past(self, row: int, /) -> Past:
        """What a row has read."""

    def join(self, rows: Sequence[int], joining: Sequence[int], /) -> list[int]:
        """Have the batch go on with its `rows`, and with the rows `joining` of these.

        Where they are now. A row of these may join several times.
        """

    def close(self) -> None:
        """Let go of the rows that have not joined."""


class RowsBeside(Protocol):
    """Rows of a batch beside which prompts can be read."""

    def begin(self, count: int, /) -> Reading:
        """Begin to read so many prompts, or fewer where so many cannot be read in one run."""
