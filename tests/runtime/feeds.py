"""Inputs for sessions in tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.names import INPUT_IDS
from loradeploy.runtime.session import AdapterSession

Ids = NDArray[np.int64]


def random_ids(rows: int, length: int, *, seed: int = 0) -> Ids:
    """Return random tokens of the tiny models without special ones: int64 [rows, length]."""
    return np.random.default_rng(seed).integers(3, 512, (rows, length))


def feeds(manifest: Manifest, ids: Ids, mask: Ids | None = None) -> dict[str, NDArray[Any]]:
    """Return inputs of a first call: an empty cache, positions that skip padding."""
    mask = np.ones_like(ids) if mask is None else mask
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    known = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "token_type_ids": np.zeros_like(ids),
    }
    result = {}
    for spec in manifest.inputs:
        if spec.name.startswith("past_key_values."):
            shape = [len(ids) if d == "batch" else 0 if d == "past" else d for d in spec.shape]
            result[spec.name] = np.zeros(shape, spec.dtype)
        else:
            result[spec.name] = known[spec.name]
    return result


def logits(session: AdapterSession, ids: Ids, adapters: Any = None) -> NDArray[Any]:
    """Return the logits of a first call."""
    return session.run(["logits"], feeds(session.manifest, ids), adapters)[0]


def rows_of(values: dict[str, NDArray[Any]], row: int) -> dict[str, NDArray[Any]]:
    """Return the inputs of a single row."""
    assert INPUT_IDS in values
    return {name: array[row : row + 1] for name, array in values.items()}
