"""Tokens that adapters add to the base's vocabulary, as side inputs.

The graph has rows of zeros after the base's. The added tokens of an adapter are passed as trained
rows (adapter_inputs/tokens.py). An offset of the logits moves all other added tokens far below, so
that a row of a batch can only get tokens of its own adapter. Several adapters can therefore use the
same ids for different tokens.

    tokens       0 … base-1    base … base+k-1      base+k … base+count-1
    adapter      the base's    its k trained rows   hidden
    the base     the base's    hidden               hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.fitting.settle import rows_in_place_of, values_digest
from loradeploy.adapter.fitting.vocabulary import (
    Vocabulary,
    resized_vocabulary,
    token_tables,
    with_factors_for,
)
from loradeploy.bundle.targets import sharing
from loradeploy.errors import AdapterMismatchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter
    from loradeploy.bundle.manifest import AddedTokens, Manifest

# e^x is 0 in every float type, and x is finite, because not every device preserves infinities. A
# high temperature raises such logits, most of all float16's minimum: the runtime removes hidden
# logits before it selects a token.
_HIDDEN: Final = -1e18


def hidden_logit(dtype: Any) -> float:
    """The logit of a hidden token in the float type `dtype`: far below all others, and finite."""
    return max(_HIDDEN, float(np.finfo(dtype).min))


def vocabulary_of_base(manifest: Manifest, added: AddedTokens) -> Vocabulary:
    """The modules of the base with one row per token; their size excludes added tokens."""
    shared = sharing(manifest.own_weights).get(f"{added.embedding}.weight", ())
    return Vocabulary(added.base, added.embedding, added.head, tied=added.head in shared)


def tokens_of(adapter: Adapter, manifest: Manifest) -> int | None:
    """The number of tokens of an adapter that fits; None if the graph has no added tokens."""
    added = manifest.added_tokens
    if added is None:
        return None
    rows = adapter.rows.get(f"{added.embedding}.weight")
    ends = [] if rows is None else [token + 1 for token in rows.indices]
    return max([added.base, *ends])


def check_tokens(adapter: Adapter, manifest: Manifest) -> None:
    """Raise AdapterMismatchError unless the graph has rows for all tokens that `adapter` adds."""
    added = manifest.added_tokens
    if added is None:
        return
    size = resized_vocabulary(adapter, vocabulary_of_base(manifest, added))
    if size is not None and not added.base < size <= added.size:
        raise AdapterMismatchError(
            f"it was trained with a vocabulary of {size} tokens, the base has {added.base} and this"
            f" bundle rows for {added.count} more: export the base with this adapter too, or merge"
            " it instead, `merge=True`"
        )


def with_trained_rows(adapter: Adapter, manifest: Manifest) -> Adapter:
    """`adapter` with trained rows in place of tables that only add rows to the base's."""
    added = manifest.added_tokens
    if added is None:
        return adapter
    known, base = manifest.own_weights, vocabulary_of_base(manifest, added)
    whole = token_tables(adapter, base)
    found = {}
    for name in base.weights:
        values = (adapter.saved if name in whole else adapter.carried).get(name)
        if values is None or values.ndim != 2 or len(values) <= added.base:
            continue
        if known.get(name) == values_digest(values[: added.base]):
            found[name] = range(added.base, len(values))
    return rows_in_place_of(adapter, found)


def with_all_tokens(adapter: Adapter, manifest: Manifest) -> Adapter:
    """`adapter` with factors of the embedding and the output head for all rows of the graph."""
    added = manifest.added_tokens
    if added is None:
        return adapter
    return with_factors_for(adapter, vocabulary_of_base(manifest, added), added.size)


def visible_logits(adapter: Adapter, manifest: Manifest) -> NDArray[np.float32]:
    """The offset [size] of the logits for an adapter that fits: zeros for its tokens."""
    size, added = tokens_of(adapter, manifest), manifest.added_tokens
    assert size is not None and added is not None
    offset = base_offset(added, manifest.factor_dtype)
    offset[:size] = 0
    return offset


def base_offset(added: AddedTokens, dtype: Any) -> NDArray[np.float32]:
    """The offset [size] of the logits for the base, which has none of the added tokens."""
    offset = np.zeros(added.size, np.float32)
    offset[added.base :] = hidden_logit(dtype)
    return offset


def tokens_in(arrays: Mapping[str, NDArray[Any]], manifest: Manifest) -> int | None:
    """As `tokens_of`, from an adapter's side inputs [1, …].

    The adapter has an added token if its row of the embedding's `lora_A`, which contains the unit
    vectors of trained rows, is not zero.
    """
    added = manifest.added_tokens
    if added is None:
        return None
    (name,) = (t.lora_A for t in manifest.targets if t.module == added.embedding)
    if name not in arrays:
        return added.base
    own = arrays[name][0, added.base :].any(axis=1).nonzero()[0]
    return added.base + int(own.max(initial=-1)) + 1
