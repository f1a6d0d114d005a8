"""Adapters that were trained on a base with another vocabulary: tokens were added, or rows cut.

`resize_token_embeddings` changes the number of rows of the embedding and of the output head, and
PEFT saves both matrices with the adapter (`save_embedding_layers`, `modules_to_save`), or trained
rows of them (`trainable_token_indices`). Such an adapter is merged into the base of its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loradeploy.errors import AdapterMismatchError, listed_names
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from loradeploy.adapter.adapter import Adapter

logger = logger_of(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """Where a base has a row per token.

    `size`: the number of rows. `embedding`, `head`: the modules; None where there is none, or it is
    not known. `tied`: whether they share one weight. `biased`: whether the head has a bias.
    """

    size: int
    embedding: str
    head: str | None = None
    tied: bool = False
    biased: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """The embedding and the head, where there is one."""
        return (self.embedding,) if self.head is None else (self.embedding, self.head)


def resized_vocabulary(adapter: Adapter, base: Vocabulary) -> int | None:
    """The size of the adapter's vocabulary; None where it is that of the base.

    Raises:
        AdapterMismatchError: rows of added tokens are in neither the base nor the adapter, or the
            adapter is for fewer tokens and does not have them whole.
    """
    size = _size(adapter, base)
    if size is None or size == base.size:
        return None
    if size < base.size and not all(_has(name, adapter, base) for name in _weights(base)):
        raise AdapterMismatchError(
            f"it was trained with a vocabulary of {size} tokens, the base has {base.size}, and it"
            f" does not have {listed_names(_weights(base))} whole: it was trained on another base,"
            " or rows were cut, then save it with save_embedding_layers=True"
        )
    if lacking := [name for name in _tables(base) if not _brought(name, adapter, base, size)]:
        added = range(base.size, size)
        raise AdapterMismatchError(
            f"it was trained with a vocabulary of {size} tokens, the base has {base.size}, and the"
            f" rows {added[0]} to {added[-1]} of {listed_names(lacking)} are in neither: save the"
            " adapter with save_embedding_layers=True"
        )
    return size


def refuse_resized(adapter: Adapter, base: Vocabulary) -> None:
    """Raise AdapterMismatchError for an adapter whose vocabulary is not that of the base.

    Adapters that are side inputs share the rows of the base.
    """
    size = resized_vocabulary(adapter, base)
    if size is not None:
        raise AdapterMismatchError(
            f"it was trained with a vocabulary of {size} tokens, the base has {base.size}, which"
            " side inputs share: merge it instead, `merge=True`"
        )


def _size(adapter: Adapter, base: Vocabulary) -> int | None:
    """How many tokens the adapter's tensors are for; None where none of them shows it."""
    for module in base.modules:
        weight = f"{module}.weight"
        for brought in (adapter.saved, adapter.carried):
            if weight in brought and brought[weight].ndim == 2:
                return len(brought[weight])
    for module in base.modules:
        if (pair := adapter.factors.get(module)) is not None:
            return int(pair.A.shape[1] if pair.kind == "embedding" else pair.B.shape[0])
    names = (f"{module}.weight" for module in base.modules)
    ends = [max(adapter.rows[name].indices) + 1 for name in names if name in adapter.rows]
    return max((end for end in ends if end > base.size), default=None)


def say_resized(name: str, before: int, size: int) -> None:
    """Say that the vocabulary of the merged bundle is that of the adapter `name`."""
    logger.warning("%s: the vocabulary has %d tokens in place of the base's %d", name, size, before)


def _weights(base: Vocabulary) -> list[str]:
    return [f"{module}.weight" for module in base.modules]


def _tables(base: Vocabulary) -> list[str]:
    """The parameters that have a row per token."""
    found = _weights(base)
    return [*found, f"{base.head}.bias"] if base.biased else found


def _has(weight: str, adapter: Adapter, base: Vocabulary) -> bool:
    """Whether the adapter has the whole weight, or the one that it is tied to."""
    shared = _weights(base) if base.tied else [weight]
    return weight in adapter.saved or any(name in adapter.carried for name in shared)


def _brought(parameter: str, adapter: Adapter, base: Vocabulary, size: int) -> bool:
    """Whether the rows beyond the base's have values."""
    if size < base.size or parameter in adapter.saved or parameter in adapter.carried:
        return True
    if parameter.endswith(".bias"):
        return False
    if _has(parameter, adapter, base):
        return True
    shared = _weights(base) if base.tied else [parameter]
    added = set(range(base.size, size))
    return any(added <= set(adapter.rows[name].indices) for name in shared if name in adapter.rows)
