"""The rounding error of a merged update in the stored precision.

With Δ the exact update and R() the rounding, the stored weights changed by
D = R(W + Δ) − R(W). `kept` = ⟨D, Δ⟩ / ‖Δ‖² is the share of the update in them, `noise` =
‖D − kept · Δ‖ / ‖Δ‖ the rest, both over all merged weights. Rounding to the dtype of the update
gives 1 and 0. Noise of 1 is as large as the update, but not in its direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.manifest import MergeError
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logger_of(__name__)

# Rounding works by rows (or blocks of a row), so a sample of rows is enough.
_ROWS: Final = 64
_LEAST_KEPT: Final = 0.95
_MOST_NOISE: Final = 0.25

Round = Callable[["NDArray[np.float32]"], "NDArray[Any]"]


def sampled(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy of the rows of a weight [out, in] by which its error is computed."""
    rows: NDArray[np.float32] = matrix[
        np.unique(np.linspace(0, len(matrix) - 1, _ROWS).astype(int))
    ]
    return rows


class Tally:
    """The error of several weights, each added by rows before and after its merge."""

    def __init__(self) -> None:
        self._exact = self._along = self._stored = 0.0

    def add(self, before: NDArray[np.float32], after: NDArray[np.float32], rounded: Round) -> None:
        """Add the update of one weight, by its `sampled` rows."""
        delta = (after - before).astype(np.float64)
        stored = rounded(after).astype(np.float64) - rounded(before).astype(np.float64)
        self._exact += float((delta * delta).sum())
        self._along += float((stored * delta).sum())
        self._stored += float((stored * stored).sum())

    def add_stored(
        self,
        before: NDArray[np.float32],
        after: NDArray[np.float32],
        stored: NDArray[np.float32],
    ) -> None:
        """Add the update of a weight that was rounded in `before`, and is now `stored`."""
        delta, changed = (W.astype(np.float64) - before for W in (after, stored))
        self._exact += float((delta * delta).sum())
        self._along += float((changed * delta).sum())
        self._stored += float((changed * changed).sum())

    def error(self) -> MergeError | None:
        """The share that is kept and the noise; None if nothing was updated."""
        if not self._exact:
            return None
        kept = self._along / self._exact
        noise = max(0.0, self._stored / self._exact - kept**2) ** 0.5
        return MergeError(float(f"{kept:.4g}"), float(f"{noise:.3g}"))


def warn_of(error: MergeError | None, precision: str) -> None:
    """Warn if rounding loses a noticeable share of the adapter."""
    if error is None or (error.kept >= _LEAST_KEPT and error.noise <= _MOST_NOISE):
        return
    logger.warning(
        "%s keeps %.0f %% of the adapter's update, with rounding noise of %.0f %% of its size:"
        " check the result with loradeploy parity, or use side inputs, which are not rounded",
        precision,
        100 * error.kept,
        100 * error.noise,
    )
