"""What the LoRA layers of every kind have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Generator, Tensor, nn

from loradeploy.adapter.adapter import Kind
from loradeploy.lora.dora import row_norms
from loradeploy.lora.initialize import Initialization, initialization
from loradeploy.lora.packed import dense, is_packed

Shape = tuple[int, ...]

_PACKED = "is held in 8 or 4 bits, which the sum would not fit: merge into the base as it was"


class LowRankLayer(nn.Module, ABC):
    """A frozen layer with one low-rank update beside it: `y = base(x) + s · low_rank(x)`.

    `lora_A` and `lora_B`, in the shapes of `adapter.Factors`, are float32 parameters, whatever the
    width of the base; `scaling` is s. With DoRA the outputs, but for the bias, are scaled by
    `magnitude` / ‖W + s · B A‖. Dropout is on the input of the low-rank path (Hu et al., 2021,
    appendix D). Nothing is merged but by `merge`.

    A subclass is one kind of layer: it says how the update is computed from `x`, and how the
    base's weight reads as a matrix [out, in].
    """

    kind: ClassVar[Kind]
    # Whether the inputs are numbers that dropout can drop.
    drops: ClassVar[bool] = True

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter | None
    # What PiSSA and OLoRA take out of the base's weight: it is subtracted here, so that the weight
    # stays as it is, to the bit.
    taken_A: Tensor | None
    taken_B: Tensor | None
    squares: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        *,
        dora: bool = False,
    ) -> None:
        super().__init__()
        shape_A, shape_B = self.shapes(base, rank)
        device = cast(Tensor, base.weight).device
        self.base = base
        self.rank = rank
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout if self.drops else 0.0)
        self.lora_A = nn.Parameter(torch.zeros(shape_A, device=device))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, device=device))
        self.magnitude = nn.Parameter(torch.ones(shape_B[0], device=device)) if dora else None
        for name in ("taken_A", "taken_B", "squares"):
            self.register_buffer(name, None, persistent=False)
        self._unmerged: nn.Parameter | None = None

    @classmethod
    def refusal(cls, base: nn.Module, rank: int, *, whole: bool) -> str | None:
        """Why `base` cannot take factors of this rank, or None.

        `whole`: the weight is needed as one matrix, for DoRA's norm or to begin at a part of it.
        """
        return None

    @classmethod
    @abstractmethod
    def shapes(cls, base: nn.Module, rank: int) -> tuple[Shape, Shape]:
        """The shapes of A and B at `base`."""

    @abstractmethod
    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """The update of `x` without its scaling."""

    @abstractmethod
    def as_matrix(self, weight: Tensor) -> Tensor:
        """`weight`, of the base's shape, as [out, in]."""

    @abstractmethod
    def as_weight(self, matrix: Tensor) -> Tensor:
        """`matrix` [out, in] in the base's shape."""

    def along_outputs(self, values: Tensor) -> Tensor:
        """`values` [out] in a shape that meets the layer's result."""
        return values

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result, in the dtype of the base's."""
        y: Tensor = self.base(x)
        if self.merged:
            return y
        dropping = self.training and self.dropout.p > 0
        dropped = self.dropout(x) if dropping else x
        update = self.scaling * self.low_rank(dropped, *self.factors())
        if self.magnitude is None:
            return (y + update).to(y.dtype)
        # y + (c - 1) · x Wᵀ + c · s · (x Aᵀ) Bᵀ with c = m / ‖W + s · B A‖; as in PEFT the dropout
        # is on the input of all that c multiplies, and without it the base is computed once.
        product = self.base(dropped) if dropping else y
        bias = getattr(self.base, "bias", None)
        if bias is not None:
            product = product - self.along_outputs(bias)
        c = self.along_outputs(self.output_scale())
        return (y + (c - 1) * product + c * update).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the update to the base's weight as it is.

        They are twice as long as the trained ones where an initialization took something out.
        """
        if self.taken_A is None or self.taken_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.taken_A]), torch.cat([self.lora_B, self.taken_B], dim=1)

    def output_scale(self) -> Tensor:
        """DoRA's m / ‖W + s · B A‖, float32 [out]; only m has a gradient."""
        magnitude = cast(nn.Parameter, self.magnitude)
        return magnitude / self._norms()

    def initialize(self, method: bool | str, generator: Generator) -> None:
        """Begin at the base, by `initialize.initialization(method)`.

        Raises:
            UsageError: `method` is none that an adapter can begin with.
        """
        with torch.no_grad():
            A, B = self.beginning(method)(self._matrix(), self.rank, self.scaling, generator)
            self.lora_A.copy_(A.view_as(self.lora_A))
            self.lora_B.copy_(B.view_as(self.lora_B))
            if A.any() and B.any():
                self.take(self.lora_A, -self.lora_B)
            if self.magnitude is not None:
                self.magnitude.copy_(self._norms())

    def beginning(self, method: bool | str) -> Initialization:
        """The function that `method` means for this kind of layer."""
        return initialization(method)

    def take(self, A: Tensor, B: Tensor) -> None:
        """Add s · B A, in the shapes of the trained factors, to the base for good."""
        self.taken_A, self.taken_B = A.detach().clone(), B.detach().clone()

    @property
    def merged(self) -> bool:
        """Whether the update is in the base's weight at present."""
        return self._unmerged is not None

    def unmergeable(self) -> str | None:
        """Why the update cannot be folded into the base's weight, or None."""
        return _PACKED if is_packed(self.base) else None

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the base's weight, in float32 with one final cast.

        The weight becomes a parameter of this layer alone: one that is tied to another module's
        leaves that module as it is. The original is kept, so that `unmerge` is exact.
        """
        if self.merged:
            return
        weight = cast(nn.Parameter, self.base.weight)
        A, B = self._matrices()
        matrix = self._matrix() + self.scaling * (B @ A)  # [out, in]
        if self.magnitude is not None:
            matrix *= (self.magnitude / matrix.norm(dim=1))[:, None]
        merged = self.as_weight(matrix).to(weight.dtype).contiguous()
        self._unmerged = weight
        self.base.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Put the base's weight back, bit for bit."""
        if self._unmerged is not None:
            self.base.weight = self._unmerged
            self._unmerged = None

    def _matrix(self) -> Tensor:
        return self.as_matrix(dense(self.base)).float()

    def _matrices(self) -> tuple[Tensor, Tensor]:
        A, B = self.factors()
        return A.detach().flatten(1), B.detach().flatten(1)

    def _norms(self) -> Tensor:
        W = self._matrix()
        if self.squares is None or self.squares.device != W.device:
            self.squares = W.square().sum(dim=1)
        return row_norms(W, self.squares, *self._matrices(), self.scaling)

    def __getattr__(self, name: str) -> Any:
        # Models read their layers' attributes: weight, bias, num_embeddings, kernel_size, …
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)
