"""The base class of LoRA layers: the update, DoRA's norms, merging into the weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Generator, Tensor, nn

from loradeploy.adapter.adapter import Kind
from loradeploy.lora.layers.initialize import Initialization, initialization
from loradeploy.lora.layers.quantized import dequantized_weight, is_quantized


@torch.no_grad()
def row_norms(W: Tensor, squares: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """‖W + s · B A‖ of every row: [out], without a gradient (section 4.3).

    `W` [out, in], `squares` [out] = ‖W‖² of its rows, `A` [rank, in] and `B` [out, rank] have one
    dtype, float32 or float64, which the result has, too.
    By ‖w + s · b A‖² = ‖w‖² + 2 s · b·(A w) + s² · b (A Aᵀ) bᵀ, no matrix of the size of W is
    allocated.
    """
    # autocast would round the products to 8 bits.
    with torch.autocast(W.device.type, enabled=False):
        crossed = (B * (W @ A.T)).sum(dim=1)
        update = (B * (B @ (A @ A.T))).sum(dim=1)
    return (squares + 2 * s * crossed + s * s * update).clamp_min(0).sqrt()


Shape = tuple[int, ...]

_QUANTIZED = (
    "is quantized to 8 or 4 bits, which cannot represent the sum: merge into the original base"
)


class LowRankLayer(nn.Module, ABC):
    """A frozen layer with a low-rank update: `y = base(x) + s · (low_rank(x) + lora_bias)`.

    `lora_A` and `lora_B`, in the shapes of `adapter.Factors`, are float32 parameters for every
    dtype of the base; `scaling` is s, and `lora_bias` [out] is None unless it was requested. With
    DoRA, the outputs without bias are scaled by `magnitude` / ‖W + s · B A‖. Dropout applies to the
    input of the low-rank path (Hu et al., 2021, appendix D). Only `merge` merges; train() and
    eval() do not.

    A subclass is one kind of layer. It defines how the update is computed from `x`, and the view of
    the base's weight as a matrix [out, in].
    """

    kind: ClassVar[Kind]
    # Whether dropout can be applied to the inputs; not to integers.
    drops: ClassVar[bool] = True

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter | None
    lora_bias: nn.Parameter | None
    # The part that PiSSA and OLoRA subtract from the base's weight. It is subtracted in the layer,
    # so that the weight stays the same, bit for bit.
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
        biased: bool = False,
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
        self.lora_bias = nn.Parameter(torch.zeros(shape_B[0], device=device)) if biased else None
        for name in ("taken_A", "taken_B", "squares"):
            self.register_buffer(name, None, persistent=False)
        self._unmerged: tuple[nn.Parameter, nn.Parameter | None] | None = None

    @classmethod
    def refusal(cls, base: nn.Module, rank: int, *, whole: bool) -> str | None:
        """Why `base` cannot take factors of this rank, or None.

        `whole`: the weight is needed as one matrix, for DoRA's norm or for an initialization from
        it.
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
        """`values` [out] in a shape that broadcasts with the layer's output."""
        return values

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, in the dtype of the base's."""
        y: Tensor = self.base(x)
        if self.merged:
            return y
        dropping = self.training and self.dropout.p > 0
        dropped = self.dropout(x) if dropping else x
        update = self.low_rank(dropped, *self.factors())
        if self.lora_bias is not None:
            update = update + self.along_outputs(self.lora_bias)
        update = self.scaling * update
        if self.magnitude is None:
            return (y + update).to(y.dtype)
        # y + (c - 1) · x Wᵀ + c · s · (x Aᵀ) Bᵀ with c = m / ‖W + s · B A‖; as in PEFT,
        # dropout applies to the input of both products with c. Without dropout the base runs once.
        product = self.base(dropped) if dropping else y
        bias = getattr(self.base, "bias", None)
        if bias is not None:
            product = product - self.along_outputs(bias)
        c = self.along_outputs(self.output_scale())
        return (y + (c - 1) * product + c * update).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the update to the unchanged weight of the base.

        They have twice the rank of the trained ones if the initialization subtracted a part.
        """
        if self.taken_A is None or self.taken_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.taken_A]), torch.cat([self.lora_B, self.taken_B], dim=1)

    def output_scale(self) -> Tensor:
        """DoRA's m / ‖W + s · B A‖, float32 [out]; only m has a gradient."""
        magnitude = cast(nn.Parameter, self.magnitude)
        return magnitude / self._norms()

    def initialize(self, method: bool | str, generator: Generator) -> None:
        """Initialize the factors by `initialize.initialization(method)`; outputs stay the base's.

        Raises:
            UsageError: `method` is not supported for training.
        """
        with torch.no_grad():
            A, B = self.initialization_of(method)(
                self._matrix(), self.rank, self.scaling, generator
            )
            self.lora_A.copy_(A.view_as(self.lora_A))
            self.lora_B.copy_(B.view_as(self.lora_B))
            if A.any() and B.any():
                self.take(self.lora_A, -self.lora_B)
            if self.magnitude is not None:
                self.magnitude.copy_(self._norms())

    def initialization_of(self, method: bool | str) -> Initialization:
        """The initialization that `method` selects for this kind of layer."""
        return initialization(method)

    def take(self, A: Tensor, B: Tensor) -> None:
        """Permanently add s · B A, in the shapes of the trained factors, to the base."""
        self.taken_A, self.taken_B = A.detach().clone(), B.detach().clone()

    @property
    def merged(self) -> bool:
        """Whether the update is currently merged into the base's weight."""
        return self._unmerged is not None

    def unmergeable(self) -> str | None:
        """Why the update cannot be merged into the base's weight, or None."""
        return _QUANTIZED if is_quantized(self.base) else None

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base's weight, in float32 with one final cast.

        The result is a new parameter: modules that are tied to the weight keep the original. The
        layer keeps it too, so that `unmerge` is exact.
        """
        if self.merged:
            return
        weight = cast(nn.Parameter, self.base.weight)
        A, B = self._matrices()
        matrix = self._matrix() + self.scaling * (B @ A)  # [out, in]
        if self.magnitude is not None:
            matrix *= (self.magnitude / matrix.norm(dim=1))[:, None]
        merged = self.as_weight(matrix).to(weight.dtype).contiguous()
        own = cast("nn.Parameter | None", getattr(self.base, "bias", None))
        self._unmerged = (weight, own)
        self.base.weight = nn.Parameter(merged, requires_grad=False)
        if self.lora_bias is not None:
            bias = self.scaling * self.lora_bias + (0 if own is None else own)
            self.base.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Restore the base's weight and bias, bit for bit."""
        if self._unmerged is not None:
            self.base.weight, own = self._unmerged
            if self.lora_bias is not None:
                self.base.register_parameter("bias", own)
            self._unmerged = None

    def _matrix(self) -> Tensor:
        return self.as_matrix(dequantized_weight(self.base)).float()

    def _matrices(self) -> tuple[Tensor, Tensor]:
        A, B = self.factors()
        return A.detach().flatten(1), B.detach().flatten(1)

    def _norms(self) -> Tensor:
        A, B = self._matrices()
        # The factors are float32, unless the whole model was converted to another dtype.
        dtype = torch.promote_types(A.dtype, torch.float32)
        W, A, B = self._matrix().to(dtype), A.to(dtype), B.to(dtype)
        if dtype != torch.float32:
            return row_norms(W, W.square().sum(dim=1), A, B, self.scaling)
        if self.squares is None or self.squares.device != W.device:
            self.squares = W.square().sum(dim=1)
        return row_norms(W, self.squares, A, B, self.scaling)

    def __getattr__(self, name: str) -> Any:
        # Models access attributes of their layers: weight, bias, num_embeddings, kernel_size, …
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)
