"""Initializations of the factors: functions of the base's weight and the rank.

Each returns A [rank, in] and B [out, rank], float32 on the device of W [out, in]. kaiming, gaussian
and embedding use only the shape of W. PiSSA and OLoRA initialize with a part of W, which is
subtracted from W, so that the output of the model stays the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch
from torch import Generator, Tensor, nn

from loradeploy.errors import UsageError

Pair = tuple[Tensor, Tensor]
Initialization = Callable[[Tensor, int, float, Generator], Pair]

_OVERSAMPLING: Final = 8
_NITER: Final = re.compile(r"pissa_niter_(\d+)")


def kaiming(W: Tensor, rank: int, s: float, generator: Generator) -> Pair:
    """A Kaiming-uniform as in nn.Linear, B zero (Hu et al., 2021, arXiv:2106.09685, 4.1)."""
    A = torch.empty(rank, W.shape[1])
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    return A.to(W.device), torch.zeros(W.shape[0], rank, device=W.device)


def gaussian(W: Tensor, rank: int, s: float, generator: Generator) -> Pair:
    """A normal with standard deviation 1 / rank, B zero."""
    A = torch.randn(rank, W.shape[1], generator=generator) / rank
    return A.to(W.device), torch.zeros(W.shape[0], rank, device=W.device)


def embedding(W: Tensor, rank: int, s: float, generator: Generator) -> Pair:
    """A zero, B standard normal: for an embedding's W [size, vocabulary], as in loralib.

    A token selects a column of A, so that a zero A changes no token.
    """
    B = torch.randn(W.shape[0], rank, generator=generator)
    return torch.zeros(rank, W.shape[1], device=W.device), B.to(W.device)


def pissa(W: Tensor, rank: int, s: float, generator: Generator) -> Pair:
    """The principal singular values and vectors of W (Meng et al., 2024, arXiv:2404.02948)."""
    _check_rank(W, rank)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return _principal(U, S, Vh, rank, s)


def pissa_niter(W: Tensor, rank: int, s: float, generator: Generator, *, niter: int) -> Pair:
    """As `pissa`, by a randomized SVD of `niter` power iterations (Halko et al., 2009, 4.4)."""
    _check_rank(W, rank)
    width = min(rank + _OVERSAMPLING, *W.shape)
    Q = torch.linalg.qr(W @ torch.randn(W.shape[1], width, generator=generator).to(W.device)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return _principal(Q @ U, S, Vh, rank, s)


def olora(W: Tensor, rank: int, s: float, generator: Generator) -> Pair:
    """The first rows and columns of W's QR decomposition (Büyükakyüz, 2024, arXiv:2406.01775)."""
    _check_rank(W, rank)
    Q, R = torch.linalg.qr(W)
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


def initialization(method: bool | str) -> Initialization:
    """The function for `init_lora_weights`.

    Raises:
        UsageError: `method` is not supported for training.
    """
    if isinstance(method, str) and (niter := _NITER.fullmatch(method)):
        return partial(pissa_niter, niter=int(niter[1]))
    if method not in _INITIALIZATIONS:
        raise UsageError(
            f"init_lora_weights {method!r} is not supported for training: use true,"
            " gaussian, pissa, pissa_niter_N or olora"
        )
    return _INITIALIZATIONS[method]


_INITIALIZATIONS: Final[Mapping[bool | str, Initialization]] = {
    True: kaiming,
    "gaussian": gaussian,
    "pissa": pissa,
    "olora": olora,
}


def _check_rank(W: Tensor, rank: int) -> None:
    """Raise UsageError if `rank` exceeds the rank of W."""
    if rank > min(W.shape):
        raise UsageError(
            f"a weight of {list(W.shape)} has no part of rank {rank} to initialize the adapter"
            " with: lower r, or use init_lora_weights true"
        )


def _principal(U: Tensor, S: Tensor, Vh: Tensor, rank: int, s: float) -> Pair:
    root = (S[:rank] / s).sqrt()  # s · B A is then the product of the first singular values
    return root[:, None] * Vh[:rank], U[:, :rank] * root
