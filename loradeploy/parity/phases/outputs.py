"""The outputs of a graph that are compared, and the positions in them that are not padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    FEATURES,
    IMAGES,
    QUESTION_ANSWERING,
    SEQ2SEQ_LM,
    VISION_TOWER,
)
from loradeploy.bundle.names import PRESENT
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest


def has_logits(task: str) -> bool:
    """Whether the first output of the task holds logits of tokens or labels."""
    return task not in (*FEATURES, VISION_TOWER, QUESTION_ANSWERING)


def output_names(manifest: Manifest) -> tuple[str, ...]:
    """Return the names of the outputs to compare: the task's main output, then the others.

    Cache outputs and those of an encoder are left out, and so are probabilities, which PyTorch does
    not return.
    """
    first = output_of(manifest)
    named = [spec.name for spec in manifest.outputs if not spec.name.startswith(PRESENT)]
    encoder = () if manifest.encoder is None else manifest.encoder.outputs
    left_out = (first, manifest.probabilities, *encoder)
    return (first, *(name for name in named if name not in left_out))


def joined(values: Sequence[NDArray[Any]], task: str) -> NDArray[Any]:
    """Return the outputs as one array; an output per row becomes one more position at its end.

    The two numbers that question answering gives for each position are put side by side.
    """
    first, *rest = values
    if task == QUESTION_ANSWERING:
        return np.stack(values, axis=-1)
    if not rest:
        return first
    return np.concatenate([first, *(value[:, np.newaxis] for value in rest)], axis=1)


def by_source(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the keys and values, [rows, heads, source, size] each, as [rows, source, width]."""
    flat = [np.swapaxes(part, 1, 2).reshape(len(part), part.shape[2], -1) for part in parts]
    return np.concatenate(flat, axis=-1)


def check_shape(manifest: Manifest) -> None:
    """Raise UsageError if a decoder's shapes show that not every token has an output."""
    if manifest.task != CAUSAL_LM:
        return
    for spec in manifest.outputs:
        if spec.name == output_of(manifest) and (len(spec.shape) < 3 or spec.shape[1] == 1):
            raise _not_all(spec.shape)


def check_positions(values: NDArray[Any], tokens: int) -> None:
    """Raise UsageError unless a decoder's `values` have a position for each of `tokens` tokens."""
    if values.ndim != 3 or values.shape[1] != tokens:
        raise _not_all(values.shape)


def _not_all(shape: Sequence[int | str]) -> UsageError:
    return UsageError(
        f"the graph gives logits [{', '.join(map(str, shape))}], not those of every token, which"
        " parity compares: export the graph with the logits of all positions"
    )


def real_positions(values: NDArray[Any], real: NDArray[np.bool_], task: str) -> NDArray[Any]:
    """Return the values of one row without those of padding, [positions, width].

    A single output for the whole row, such as a classifier's, becomes one position.
    """
    if values.ndim == 1:
        return values[np.newaxis]
    if task == SEQ2SEQ_LM or task in IMAGES:
        return values  # a target or an image has no padding
    whole_row = np.ones(max(0, len(values) - len(real)), bool)
    chosen = np.concatenate([real, whole_row])
    places = np.flatnonzero(chosen)
    # With padding on one side, a slice is enough: large logits are not copied.
    if len(chosen) == len(values) and len(places) and np.ptp(places) + 1 == len(places):
        return values[places[0] : places[-1] + 1]
    kept: NDArray[Any] = values[chosen]
    return kept
