"""The outputs of a graph that are compared, and which positions of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.tasks import CAUSAL_LM, FEATURES, IMAGES, SEQ2SEQ_LM, VISION_TOWER
from loradeploy.bundle.names import PRESENT
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest


def has_logits(task: str) -> bool:
    """Whether a position of the first output is a distribution over tokens or labels."""
    return task not in (*FEATURES, VISION_TOWER)


def output_names(manifest: Manifest) -> tuple[str, ...]:
    """The outputs that are compared: the task's own, then what else there is but the cache.

    Probabilities that the graph makes of the first are left out: PyTorch gives none.
    """
    first = output_of(manifest)
    named = [spec.name for spec in manifest.outputs if not spec.name.startswith(PRESENT)]
    return (first, *(name for name in named if name not in (first, manifest.probabilities)))


def joined(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """The outputs as one array: what is given for a row as a whole becomes its last positions."""
    first, *rest = values
    if not rest:
        return first
    return np.concatenate([first, *(value[:, np.newaxis] for value in rest)], axis=1)


def by_source(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Keys and values of sources, [rows, heads, source, size] each, as [rows, source, width]."""
    flat = [np.swapaxes(part, 1, 2).reshape(len(part), part.shape[2], -1) for part in parts]
    return np.concatenate(flat, axis=-1)


def check_shape(manifest: Manifest) -> None:
    """Raise UsageError where the graph's shapes show that not every token has an output."""
    if manifest.task != CAUSAL_LM:
        return
    for spec in manifest.outputs:
        if spec.name == output_of(manifest) and (len(spec.shape) < 3 or spec.shape[1] == 1):
            raise _not_all(spec.shape)


def check_positions(values: NDArray[Any], tokens: int) -> None:
    """Raise UsageError unless a decoder's `values` are of all of the `tokens` that it was fed."""
    if values.ndim != 3 or values.shape[1] != tokens:
        raise _not_all(values.shape)


def _not_all(shape: Sequence[int | str]) -> UsageError:
    return UsageError(
        f"the graph gives logits [{', '.join(map(str, shape))}], not those of every token, which"
        " parity compares: export the graph with the logits of all positions"
    )


def real_positions(values: NDArray[Any], real: NDArray[np.bool_], task: str) -> NDArray[Any]:
    """One row's values without the padding's, [positions, width].

    One answer for the whole row, as a classifier's, is one position.
    """
    if values.ndim == 1:
        return values[np.newaxis]
    if task == SEQ2SEQ_LM or task in IMAGES:
        return values  # the target's, or an image's
    whole_row = np.ones(max(0, len(values) - len(real)), bool)
    chosen = np.concatenate([real, whole_row])
    places = np.flatnonzero(chosen)
    # Padding on one side leaves a part as it lies: a vocabulary's logits are not copied.
    if len(chosen) == len(values) and len(places) and np.ptp(places) + 1 == len(places):
        return values[places[0] : places[-1] + 1]
    kept: NDArray[Any] = values[chosen]
    return kept
