"""Rank reduction: the best adapter of a lower rank, from the singular values of each update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.algebra.delta import matrices
from loradeploy.adapter.scaling import with_ranks
from loradeploy.errors import AdapterError, UsageError, shown
from loradeploy.given_numbers import checked_count, checked_number

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class RankReport:
    """The result of a rank reduction.

    `ranks`, `errors`: by module, its new rank and ‖ΔW − ΔW'‖ / ‖ΔW‖ (Frobenius norm). `total`: the
    same error over all modules.
    """

    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    total: float

    @property
    def worst(self) -> float:
        """The largest error of a module."""
        return max(self.errors.values(), default=0.0)

    @property
    def worst_module(self) -> str:
        """The module of the largest error."""
        return max(self.errors, key=self.errors.__getitem__)


def reduce_rank(
    adapter: Adapter, rank: int | None = None, *, energy: float | None = None
) -> tuple[Adapter, RankReport]:
    """`adapter` with at most `rank` in every module, or with the ranks that keep `energy` of ‖ΔW‖².

    By Eckart and Young (1936) no factors of that rank are nearer to B A in Frobenius norm. Modules
    whose rank is not higher, the scalings, DoRA's magnitudes and fully trained parameters stay
    unchanged. The product B A is not computed: the SVD is of the small R factors of B and Aᵀ.

    Raises:
        UsageError: neither or both of `rank` and `energy`, or not `rank` ≥ 1 or 0 < `energy` ≤ 1.
        AdapterError: a convolution with several groups, or factors that apply to a base that the
            initialization changed.
    """
    if (rank is None) == (energy is None):
        raise UsageError("give either `rank` or `energy` to reduce the adapter to")
    if rank is not None:
        rank = checked_count("`rank`", rank)
    if energy is not None and not 0 < (checked_number(energy) or 0) <= 1:
        raise UsageError(
            f"`energy` is {shown(energy)}: give a fraction above 0 and up to 1, such as 0.99"
        )
    if not isinstance(adapter, Adapter):
        raise UsageError(f"`adapter` is {shown(adapter)}: give an Adapter, see load_adapter")
    adapter.check_plain()
    if experts := sorted(n for n, pair in adapter.factors.items() if pair.kind == "experts"):
        raise AdapterError(
            f"{experts[0]} has factors of experts, whose rank cannot be reduced: train with the"
            " rank that is needed"
        )
    factors, errors = {}, {}
    energy_removed = energy_of_all = 0.0
    for module, pair in adapter.factors.items():
        U, S, Vh = _svd(pair)
        squares = S**2
        kept = pair.rank if rank is None else min(rank, pair.rank)
        if energy is not None and squares.any():
            reached = np.cumsum(squares) >= energy * squares.sum()
            kept = int(np.argmax(reached)) + 1 if reached.any() else pair.rank
        elif energy is not None:
            kept = 1
        removed = float(squares[kept:].sum())
        errors[module] = math.sqrt(removed / float(squares.sum())) if removed else 0.0
        energy_removed += adapter.scaling(module) ** 2 * removed
        energy_of_all += adapter.scaling(module) ** 2 * float(squares.sum())
        factors[module] = pair if kept >= pair.rank else _truncated(pair, U, S, Vh, kept)
    ranks = {module: pair.rank for module, pair in factors.items()}
    config = with_ranks(adapter.config, ranks, {m: adapter.scaling(m) for m in ranks})
    report = RankReport(
        ranks, errors, math.sqrt(energy_removed / energy_of_all) if energy_of_all else 0.0
    )
    return dataclasses.replace(adapter, config=config, factors=factors), report


def _svd(
    pair: Factors,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """U [out, rank], S and Vh [rank, in] of B A, in float64."""
    A, B = (half.astype(np.float64) for half in matrices(pair))
    Q_B, R_B = np.linalg.qr(B)
    Q_A, R_A = np.linalg.qr(A.T)
    U, S, Vh = np.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.T


def _truncated(
    pair: Factors,
    U: NDArray[np.float64],
    S: NDArray[np.float64],
    Vh: NDArray[np.float64],
    rank: int,
) -> Factors:
    rank = min(rank, len(S))
    root = np.sqrt(S[:rank])  # √S in both keeps their magnitudes similar, for float16
    A = (root[:, None] * Vh[:rank]).astype(np.float32)
    B = (U[:, :rank] * root).astype(np.float32)
    return dataclasses.replace(
        pair,
        A=A.reshape(rank, *pair.A.shape[1:]),
        B=B.reshape(len(B), rank, *pair.B.shape[2:]),
    )
