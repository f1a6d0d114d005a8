"""The interfaces of an open backend, which the phases call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]


class Model(Protocol):
    """An open backend."""

    def forward(
        self, ids: Ids, mask: Ids, cache: Any, adapters: Sequence[str | None]
    ) -> tuple[NDArray[Any], Any]:
        """Map `ids` [rows, new tokens] and `mask` [rows, all tokens] to values and the next cache.

        The values are [rows, new tokens, width], with one more position if there is an output for
        the whole row; a classifier's are [rows, labels]. `cache` is None at first, then the one
        that the previous call returned. `adapters` names each row's adapter; None is the base.
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
        """See `Model.forward`; `embeds`: the feeds for the manifest's `embeds`, by name."""


class SourceModel(Model, Protocol):
    """A backend of an encoder-decoder with a cache."""

    def encode(self, ids: Ids, mask: Ids, adapters: Sequence[str | None]) -> NDArray[Any]:
        """Return the keys and values of the sources `ids` [rows, source]: [rows, source, width]."""

    def decode(self, ids: Ids, mask: Ids, adapters: Sequence[str | None]) -> NDArray[Any]:
        """Decode the targets of the sources `ids` one token per step: [rows, target, width]."""
