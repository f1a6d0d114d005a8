"""The weight update ΔW of factors, for every kind of layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.errors import AdapterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Factors


def update(pair: Factors, s: float) -> NDArray[np.float32]:
    """ΔW = s · B A in float32, in the shape of the weight that it is added to.

    linear [out, in], embedding [vocabulary, size], conv2d [out, in, height, width]. A Conv1D of
    transformers, whose weight is [in, out], needs the transpose.

    Raises:
        AdapterError: a convolution with several groups, whose update does not have the weight's
            shape.
    """
    A, B = matrices(pair)
    product: NDArray[np.float32] = np.float32(s) * (B @ A)  # [out, in]
    if pair.kind == "embedding":
        return np.ascontiguousarray(product.T)
    return product.reshape(B.shape[0], *pair.A.shape[1:])


def expert_updates(pair: Factors, s: float) -> NDArray[np.float32]:
    """ΔW = s · B A of each expert in float32, [experts, in, out]."""
    A = pair.A.astype(np.float32).reshape(-1, pair.experts, pair.A.shape[1])  # [rank, experts, in]
    B = pair.B.astype(np.float32).reshape(len(pair.B), -1, pair.experts)  # [out, rank, experts]
    product: NDArray[np.float32] = A.transpose(1, 2, 0) @ (np.float32(s) * B).transpose(2, 1, 0)
    return product


def matrices(pair: Factors) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A [rank, in] and B [out, rank] as float32; kernel positions are flattened into the inputs.

    Raises:
        AdapterError: a convolution with several groups.
    """
    if pair.groups > 1:
        # PEFT's A reads all inputs; each group of the layer reads only its own.
        raise AdapterError(
            f"LoRA on a convolution of {pair.groups} groups cannot be merged into its weight:"
            " leave that layer out of target_modules"
        )
    if pair.kind == "experts":
        raise AdapterError("factors of experts have an update for each: use `expert_updates`")
    A, B = pair.A.astype(np.float32), pair.B.astype(np.float32)
    return A.reshape(A.shape[0], -1), B.reshape(B.shape[0], -1)


def as_matrix(weight: NDArray[Any], pair: Factors) -> NDArray[Any]:
    """`weight` (as in `update`) as a view [out, in], as the factors see it."""
    return weight.T if pair.kind == "embedding" else weight.reshape(weight.shape[0], -1)
