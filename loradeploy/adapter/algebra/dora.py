"""DoRA: weight-decomposed low-rank adaptation (Liu et al., 2024, arXiv:2402.09353).

A weight is its magnitude times its direction, and both are adapted: W' = m · (W + s · B A) / ‖W +
s · B A‖, with the norm of each output's row. So every output is the LoRA output without bias,
multiplied by one number: m / ‖W + s · B A‖.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loradeploy.adapter.algebra.delta import matrices
from loradeploy.errors import AdapterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Factors

_BLOCK = 1 << 22  # values of W in a block, 16 MiB


def output_scale(W: NDArray[np.float32], pair: Factors, s: float) -> NDArray[np.float32]:
    """m / ‖W + s · B A‖ for every output: float32 [out].

    `W` is the base's weight as [out, in] (`delta.as_matrix`: an embedding's transposed, a
    convolution's with its kernel flattened). It is processed in blocks of rows, without a copy of
    W.

    Raises:
        AdapterError: the factors have no magnitude, or are those of a grouped convolution.
    """
    if pair.magnitude is None:
        raise AdapterError("the factors have no magnitude: the adapter is not a DoRA adapter")
    A, B = matrices(pair)
    norm = np.empty(len(W), np.float32)
    rows = max(1, _BLOCK // max(1, W.shape[1]))
    for start in range(0, len(W), rows):
        block = slice(start, start + rows)
        norm[block] = np.linalg.norm(W[block] + np.float32(s) * (B[block] @ A), axis=1)
    return (pair.magnitude.astype(np.float32) / norm).astype(np.float32, copy=False)
