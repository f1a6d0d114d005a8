"""Runs a decoder step by step with different adapters, like a client with its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loradeploy.runtime.session import AdapterSession


def logits_of_steps(
    session: AdapterSession, tokens: NDArray[np.int64], adapters: Sequence[Any]
) -> NDArray[np.float32]:
    """Return the logits [steps, rows, vocabulary] of `tokens` [rows, steps], by step with adapters.

    The cache is in place: if the buffers of the session have fixed addresses, so does the mask.
    """
    rows, steps = tokens.shape
    cache = session.empty_cache(rows)
    cache.make_room(steps, steps)
    found = []
    for step, names in enumerate(adapters):
        mask = np.zeros((rows, cache.length or step + 1), np.int64)
        mask[:, : step + 1] = 1
        feeds = {
            "input_ids": tokens[:, step : step + 1],
            "attention_mask": mask,
            "position_ids": np.full((rows, 1), step),
        }
        logits, *present = session.run_with_ort_values(
            ["logits", *cache.outputs], {**feeds, **cache.inputs}, names, buffers=cache.buffers
        )
        cache.keep(present)
        found.append(logits.numpy()[:, 0].copy())
    return np.stack(found)
