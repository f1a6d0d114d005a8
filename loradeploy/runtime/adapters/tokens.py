"""Check tokens of rows against the vocabulary of their adapters, which may add tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loradeploy.bundle.fitting.added_tokens import tokens_in
from loradeploy.bundle.names import INPUT_IDS
from loradeploy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest
    from loradeploy.runtime.adapters.leases import Lease
    from loradeploy.runtime.adapters.resident import Resident


def vocabulary_of_row(own: Resident | None, manifest: Manifest) -> int | None:
    """The vocabulary size of a row with the adapter `own`; None if no adapter adds tokens.

    Later logits of the row belong to tokens of other adapters; they are removed before a token is
    chosen. `own` is None for the base.
    """
    added = manifest.added_tokens
    if added is None:
        return None
    return added.base if own is None else tokens_in(own.host, manifest)


def check_tokens_of(
    lease: Lease, ids: NDArray[np.int64] | Sequence[Sequence[int]], manifest: Manifest
) -> None:
    """Raise UsageError for a token of `ids` [rows, tokens] that its row's adapter does not have."""
    added = manifest.added_tokens
    if added is None:
        return
    largest = np.asarray(ids).max(axis=1, initial=0)
    for row in (largest >= added.base).nonzero()[0]:
        own = lease.rows[row if lease.per_row else 0]
        known = vocabulary_of_row(own, manifest)
        if known is not None and largest[row] >= known:
            raise UsageError(
                f"row {row} of {INPUT_IDS} contains the token {largest[row]}, and"
                f" {'the base' if own is None else 'its adapter'} has tokens up to {known - 1}:"
                " give those of its own tokenizer"
            )
