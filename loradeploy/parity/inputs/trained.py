"""The tokens whose embedding or head rows adapters changed, which may be in no prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.base_files import base_tensors
from loradeploy.bundle.model_config import model_config
from loradeploy.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter
    from loradeploy.adapter.files.tensors import StoredTensor

_COMPARED: Final = 4096  # rows of two tables at a time


def trained_tokens(adapters: Sequence[Adapter], base: Path) -> tuple[int, ...]:
    """Return the tokens whose embedding or head rows the adapters changed, in turn by adapter.

    These are the rows that were trained individually; and, of whole tables in an adapter, the rows
    beyond those of the model in `base`, and the rows that differ from the model's, the most
    different first.

    Raises:
        ModelError: the files of the model cannot be read.
    """
    each = [_of(adapter, base) for adapter in adapters]
    turns = (token for turn in zip_longest(*each) for token in turn if token is not None)
    return tuple(dict.fromkeys(turns))


def _of(adapter: Adapter, base: Path) -> list[int]:
    trained = [token for rows in adapter.rows.values() for token in rows.indices]
    whole = {n: v for n, v in {**adapter.carried, **adapter.saved}.items() if v.ndim == 2}
    size = _vocabulary(base) if whole else None
    if size is None:
        return trained
    stored = {name: tensor for name, tensor in base_tensors(base).items() if len(tensor.shape) == 2}
    pairs = _tables(whole, stored, size)
    added = [range(size, len(values)) for values, _ in pairs]
    changed = [_changed(values, own) for values, own in pairs]
    return [*trained, *(token for tokens in (*added, *changed) for token in tokens)]


def _tables(
    whole: Mapping[str, NDArray[Any]], stored: Mapping[str, StoredTensor], size: int
) -> list[tuple[NDArray[Any], StoredTensor]]:
    """Pair each table of the adapter that has a row per token with the model's, of `size` rows.

    A head that is tied to the embedding is not stored, and is paired with the embedding.
    """
    ends: dict[str, list[StoredTensor]] = {}
    for name, tensor in stored.items():
        ends.setdefault(_end(name), []).append(tensor)
    tables = [tensor for tensor in stored.values() if tensor.shape[0] == size]
    found = []
    for name, values in whole.items():
        named = ends.get(_end(name), tables if len(values) >= size else [])
        own = [tensor for tensor in named if tensor.shape == (size, values.shape[1])]
        if own:
            found.append((values, own[0]))
    return found


def _end(name: str) -> str:
    """Return the last two parts of a parameter's name; the prefix differs between model classes."""
    return ".".join(name.split(".")[-2:])


def _changed(values: NDArray[Any], own: StoredTensor) -> list[int]:
    """Return the numbers of rows that differ, the most different first."""
    shared = min(len(values), own.shape[0])
    apart = np.zeros(shared, np.float32)
    for first in range(0, shared, _COMPARED):
        rows = list(range(first, min(first + _COMPARED, shared)))
        theirs = own.take(rows, 0).astype(np.float32)
        difference = np.abs(values[rows].astype(np.float32) - theirs)
        apart[rows] = difference.max(axis=1, initial=0.0)
    order = np.argsort(-apart, kind="stable")
    return [int(token) for token in order if apart[token] != 0]


def _vocabulary(base: Path) -> int | None:
    """Return the vocabulary size of the model in `base`; None if its config does not have it."""
    config = model_config(base, error=ModelError)
    inner = config.get("text_config")
    for settings in (config, inner if isinstance(inner, Mapping) else {}):
        if type(settings.get("vocab_size")) is int:
            return int(settings["vocab_size"])
    return None
