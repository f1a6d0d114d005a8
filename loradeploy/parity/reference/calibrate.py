"""The gap of a precision, measured in PyTorch on the inputs of the check (see tolerances.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.parity.figures.metrics import Comparison, Figures
from loradeploy.parity.figures.tolerances import POOLED
from loradeploy.parity.phases.choice import spread
from loradeploy.parity.phases.fed import embeds_feeds
from loradeploy.parity.reference.loading import size_of
from loradeploy.parity.reference.quantized import QUANTIZED
from loradeploy.parity.reference.rounding import DTYPES, Activations, in_dtype, rounded_activations

if TYPE_CHECKING:
    import torch

    from loradeploy.parity.phases.models import EmbedsModel
    from loradeploy.parity.phases.rows import Row

# Number of prompts, spread over all lengths, that are computed again. In float64, which is slower
# and casts each weight, just enough to include the shortest and the longest. Measuring fewer rows
# can only make the limit of a largest error smaller. With large factors, one row may be rounded
# several times as much as all others: of a small model, they are all measured.
_CASES: Final = 6
_CASES_IN_FLOAT64: Final = 3
_CASES_OF_SMALL: Final = 32
_SMALL: Final = 1 << 27  # bytes of a model's parameters
_FLOAT64: Final = DTYPES["fp32"]


def measure_gap(
    model: torch.nn.Module,
    forward: EmbedsModel,
    rows: Sequence[Row],
    precision: str,
    activations: Mapping[str, Activations],
    *,
    scale: float,
    logits: bool,
    embeds: bool,
) -> Figures:
    """Measure the error that the rounding of `precision` alone causes in PyTorch, on some `rows`.

    `forward` runs `model`, which has the rows' adapter in it; `rows` have its outputs in float32.
    `activations`: the modules whose inputs are rounded, because their weights are quantized.
    `embeds`: whether the rows are fed embeddings (`Row.reading`).
    """
    gap = Comparison(scale=scale, logits=logits)
    of_rows: list[Figures] = []
    rounded_products = precision in QUANTIZED and bool(activations)
    exactly = not rounded_products and DTYPES.get(precision, _FLOAT64) == _FLOAT64
    cases = _CASES_IN_FLOAT64 if exactly else _CASES
    if size_of(model) <= _SMALL:
        cases = _CASES_OF_SMALL
    measured = spread(rows, cases)
    # Of all rows, the gap is that of the values which the limits are for.
    whole = len(measured) == len(rows)
    with _less_exact(model, precision, activations):
        for row in measured:
            ids = np.array([row.tokens], np.int64)
            mask = np.ones_like(ids)
            fed = embeds_feeds([row.fed], mask) if embeds and row.fed is not None else None
            values, _ = forward.forward(ids, mask, None, [row.adapter], embeds=fed)
            values = values[..., : row.outputs].reshape(row.expected.shape)
            # Computed in float64, the values are the more exact side; otherwise the less exact one.
            exact, rounded = row.expected, values
            if values.dtype == np.float64:
                exact, rounded = rounded, exact
            gap.add(exact, rounded)
            if whole:
                continue
            of_row = Comparison(scale=scale, logits=False)
            of_row.add(exact, rounded)
            of_rows.append(of_row.figures())
    return gap.figures() if whole else evened(gap.figures(), of_rows)


def evened(pooled: Figures, of_rows: Sequence[Figures]) -> Figures:
    """Return `pooled` with its mean and p99 no larger than the averages over `of_rows`.

    Of few rows, the longest has most of the values and the largest errors; in the average, all rows
    count equally.
    """
    averages = {name: float(np.mean([getattr(f, name) for f in of_rows])) for name in POOLED}
    least = {name: min(getattr(pooled, name), average) for name, average in averages.items()}
    changed: dict[str, Any] = {**least}
    return dataclasses.replace(pooled, **changed)


def _less_exact(
    model: torch.nn.Module, precision: str, activations: Mapping[str, Activations]
) -> AbstractContextManager[None]:
    if precision in QUANTIZED and activations:
        return rounded_activations(model, activations)
    return in_dtype(model, DTYPES.get(precision, _FLOAT64))
