"""Adapters trained with a resized vocabulary: tokens were added to the base's, or rows removed.

`resize_token_embeddings` changes the number of rows of the embedding and of the output head, and
PEFT saves both matrices with the adapter (`save_embedding_layers`, `modules_to_save`), or trained
rows of them (`trainable_token_indices`). A merge gives the base the size of the adapter's
vocabulary. With side inputs, added tokens are trained rows after the base's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.adapter import Rows
from loradeploy.adapter.fitting.settle import with_rows_for
from loradeploy.errors import AdapterMismatchError, listed_names
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter, Factors

logger = logger_of(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """The modules of a base that have one row per token.

    `size`: the number of rows. `embedding`, `head`: the modules; `head` is None if there is none or
    it is unknown. `tied`: whether they share one weight. `biased`: whether the head has a bias.
    """

    size: int
    embedding: str
    head: str | None = None
    tied: bool = False
    biased: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """The embedding and, if it is known, the head."""
        return (self.embedding,) if self.head is None else (self.embedding, self.head)

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights of these modules: tables with one row per token."""
        return tuple(f"{module}.weight" for module in self.modules)


def resized_vocabulary(adapter: Adapter, base: Vocabulary) -> int | None:
    """The size of the adapter's vocabulary; None if it is that of the base.

    Raises:
        AdapterMismatchError: rows of added tokens are in neither the base nor the adapter, or the
            adapter is for fewer tokens and does not contain the whole tables.
    """
    size = _size(adapter, base)
    if size is None or size == base.size:
        return None
    if size < base.size and not all(_has(name, adapter, base) for name in base.weights):
        raise AdapterMismatchError(
            f"it was trained with a vocabulary of {size} tokens, the base has {base.size}, and it"
            f" does not have {listed_names(base.weights)} whole: it was trained on another base,"
            " or rows were cut, then save it with save_embedding_layers=True"
        )
    if lacking := [
        name for name in _tables(base) if not _has_added_rows(name, adapter, base, size)
    ]:
        added = range(base.size, size)
        raise AdapterMismatchError(
            f"it was trained with a vocabulary of {size} tokens, the base has {base.size}, and the"
            f" rows {added[0]} to {added[-1]} of {listed_names(lacking)} are in neither: save the"
            " adapter with save_embedding_layers=True"
        )
    return size


def refuse_resized(adapter: Adapter, base: Vocabulary) -> None:
    """Raise AdapterMismatchError for an adapter whose vocabulary is not that of the base.

    For bundles whose side inputs do not include added tokens.
    """
    size = resized_vocabulary(adapter, base)
    if size is not None:
        raise AdapterMismatchError(
            f"it was trained with a vocabulary of {size} tokens, the base has {base.size}, which"
            " side inputs share: merge it instead, `merge=True`"
        )


def added_tokens(adapter: Adapter, base: Vocabulary, most: int) -> int:
    """The number of tokens that `adapter` adds to the base's, for side inputs.

    Raises:
        AdapterMismatchError: as `resized_vocabulary`; or it adds more than `most`, or has fewer
            tokens than the base, or the base's output head has a bias.
    """
    size = resized_vocabulary(adapter, base)
    if size is None:
        return 0
    if size < base.size or size - base.size > most:
        counted = "fewer" if size < base.size else f"{size - base.size} more"
        raise AdapterMismatchError(
            f"it was trained with a vocabulary of {size} tokens, {counted} than the base's"
            f" {base.size}, and side inputs have at most {most} more: merge it instead,"
            " `merge=True`"
        )
    if base.biased:
        raise AdapterMismatchError(
            f"it was trained with a vocabulary of {size} tokens, the base has {base.size}, and"
            f" {base.head} has a bias, whose rows cannot be side inputs: merge it instead,"
            " `merge=True`"
        )
    return size - base.size


def token_tables(adapter: Adapter, base: Vocabulary) -> tuple[str, ...]:
    """The fully trained tables of the adapter that trained rows can replace.

    Rows apply to both of two tied tables, and PEFT trains a copy of each: they can be replaced only
    if the adapter has both.
    """
    saved = tuple(name for name in base.weights if name in adapter.saved)
    return saved if len(saved) == len(base.weights) or not base.tied else ()


def without_added(adapter: Adapter, base: Vocabulary) -> Adapter:
    """`adapter` without its added tokens, and without its whole tables.

    It fits the same bases as `adapter`. This can be checked before the base's tables are read.
    """
    if resized_vocabulary(adapter, base) is None:
        return adapter
    whole = {**adapter.carried, **adapter.saved}
    tables = [name for name in base.weights if name in whole]
    rows = {name: Rows((), whole[name][:0]) for name in tables}
    for name, each in adapter.rows.items():
        own = [place for place, token in enumerate(each.indices) if token < base.size]
        rows[name] = Rows(tuple(each.indices[place] for place in own), each.values[own])
    kept = with_rows_for(dataclasses.replace(adapter, rows=rows), tables, rows)
    return with_factors_for(kept, base, base.size)


def with_factors_for(adapter: Adapter, base: Vocabulary, size: int) -> Adapter:
    """`adapter` with the embedding's and the head's factors cut or zero-padded to `size` tokens.

    DoRA's factors are unchanged, because they scale rows of the base, too.
    """
    factors = dict(adapter.factors)
    for module in base.modules:
        pair = factors.get(module)
        if pair is not None and pair.magnitude is None:
            factors[module] = _for_tokens(pair, size)
    return dataclasses.replace(adapter, factors=factors)


def _for_tokens(pair: Factors, size: int) -> Factors:
    if pair.kind == "embedding":
        return dataclasses.replace(pair, A=_resized(pair.A.T, size).T)
    bias = None if pair.bias is None else _resized(pair.bias, size)
    return dataclasses.replace(pair, B=_resized(pair.B, size), bias=bias)


def _resized(table: NDArray[Any], size: int) -> NDArray[Any]:
    kept = table[:size]
    return np.pad(kept, ((0, size - len(kept)), *((0, 0),) * (kept.ndim - 1)))


def _size(adapter: Adapter, base: Vocabulary) -> int | None:
    """The number of tokens that the adapter's tensors are for; None if no tensor shows it."""
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


def tied_head_refusal(embedding: str, head: str) -> str:
    """Why trained rows of only the output head, which is tied to the embedding, are refused."""
    return (
        f"rows of {head} were trained (trainable_token_indices) and none of {embedding}, which is"
        " tied to it in the base: in PEFT these only change the output. Give the base untied"
        " (tie_word_embeddings: false), or train the rows of the embedding"
    )


def warn_of_resize(name: str, before: int, size: int) -> None:
    """Warn that the merged bundle has the vocabulary of the adapter `name`."""
    logger.warning("%s: the vocabulary has %d tokens in place of the base's %d", name, size, before)


def _tables(base: Vocabulary) -> list[str]:
    """The parameters that have a row per token."""
    return [*base.weights, f"{base.head}.bias"] if base.biased else [*base.weights]


def _has(weight: str, adapter: Adapter, base: Vocabulary) -> bool:
    """Whether the adapter has the whole weight, or a whole weight that is tied to it."""
    shared = base.weights if base.tied else [weight]
    return weight in adapter.saved or any(name in adapter.carried for name in shared)


def _has_added_rows(parameter: str, adapter: Adapter, base: Vocabulary, size: int) -> bool:
    """Whether the adapter has values for the rows of `parameter` beyond the base's."""
    if size < base.size or parameter in adapter.saved or parameter in adapter.carried:
        return True
    if parameter.endswith(".bias"):
        return False
    if _has(parameter, adapter, base):
        return True
    shared = base.weights if base.tied else [parameter]
    added = set(range(base.size, size))
    return any(added <= set(adapter.rows[name].indices) for name in shared if name in adapter.rows)
