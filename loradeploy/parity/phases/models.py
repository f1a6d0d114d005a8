"""What a backend is, once it is open: what the phases call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]


class Model(Protocol):
    """A backend, opened."""

    def forward(
        self, ids: Ids, mask: Ids, cache: Any, adapters: Sequence[str | None]
    ) -> tuple[NDArray[Any], Any]:
        """`ids` [rows, new tokens] and `mask` [rows, all tokens] → values and the next cache.

        The values are [rows, new tokens, width], with one more position where there is an output
        for the whole row, or [rows, labels] of a classifier. `cache` is None at first, then what
        the call before returned. `adapters` names each row's adapter.
        """


class EmbedsModel(Protocol):
    """A backend of a decoder that takes embeddings."""

    def forward(
        self,
        ids: Ids,
        mask: Ids,
        cache: Any,
        adapters: Sequence[str | None],
        *,
        embeds: Mapping[str, NDArray[Any]] | None = None,
    ) -> tuple[NDArray[Any], Any]:
        """See `Model.forward`; `embeds`: the manifest's `embeds`, by name."""


class SourceModel(Model, Protocol):
    """A backend of an encoder-decoder with a cache."""

    def encode(self, ids: Ids, mask: Ids, adapters: Sequence[str | None]) -> NDArray[Any]:
        """For sources `ids`, their keys and values → [rows, source, width]."""

    def decode(self, ids: Ids, mask: Ids, adapters: Sequence[str | None]) -> NDArray[Any]:
        """For sources `ids`, the target's tokens one a step → [rows, target, width]."""
