"""LoRA (Hu et al., 2021, arXiv:2106.09685) in PyTorch: each layer is the paper's equation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Final, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from loradeploy.adapter.adapter import Kind
from loradeploy.lora.initialize import Initialization, embedding, initialization
from loradeploy.lora.product import low_rank_linear
from loradeploy.lora.quantized import dequantized_weight, is_quantized
from loradeploy.lora.targets import LINEAR_LAYERS


@torch.no_grad()
def row_norms(W: Tensor, squares: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """‖W + s · B A‖ of every row: float32 [out], a constant to the gradient (section 4.3).

    `W` [out, in], `squares` [out] = ‖W‖² of its rows, `A` [rank, in], `B` [out, rank], float32.
    By ‖w + s · b A‖² = ‖w‖² + 2 s · b·(A w) + s² · b (A Aᵀ) bᵀ nothing as large as W is made.
    """
    with torch.autocast(W.device.type, enabled=False):  # which would round the products to 8 bits
        crossed = (B * (W @ A.T)).sum(dim=1)
        own = (B * (B @ (A @ A.T))).sum(dim=1)
    return (squares + 2 * s * crossed + s * s * own).clamp_min(0).sqrt()


Shape = tuple[int, ...]

_QUANTIZED = "is quantized to 8 or 4 bits, which cannot hold the sum: merge into the base as it was"


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
        return _QUANTIZED if is_quantized(self.base) else None

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
        return self.as_matrix(dequantized_weight(self.base)).float()

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


class LoraLinear(LowRankLayer):
    """A frozen linear layer with one low-rank update beside it: `y = x Wᵀ + s · (x Aᵀ) Bᵀ`.

    `x` [..., in] → [..., out]; `lora_A` [rank, in], `lora_B` [out, rank].
    """

    kind = "linear"

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> tuple[Shape, Shape]:
        """[rank, in] and [out, rank]."""
        # A weight in 4 bits has a shape of its own: an nn.Linear is asked for its sizes.
        if isinstance(base, nn.Linear):
            return (rank, base.in_features), (base.out_features, rank)
        into, out = cast(Tensor, base.weight).shape
        return (rank, into), (out, rank)

    def forward(self, x: Tensor) -> Tensor:
        """As every kind's, but the plain case as one product: it is most of a training step."""
        if not self._is_plain(x):
            return super().forward(x)
        weight = self.as_matrix(cast(Tensor, self.base.weight))
        bias = cast("Tensor | None", self.base.bias)
        return low_rank_linear(x, weight, bias, *self.factors(), self.scaling)

    def _is_plain(self, x: Tensor) -> bool:
        """Whether base and update are the one equation, with nothing frozen that is trained."""
        base = self.base
        own = (base.weight, base.bias)
        return (
            type(base) in LINEAR_LAYERS
            and self.magnitude is None
            and not self.merged
            and not (self.training and self.dropout.p > 0)
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and all(type(p) is nn.Parameter and not p.requires_grad for p in own if p is not None)
            and x.dtype == base.weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """(x Aᵀ) Bᵀ."""
        return linear(linear(x.to(A.dtype), A), B)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A Conv1D's weight turned."""
        return weight.T if isinstance(self.base, Conv1D) else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """A Conv1D's weight turned back."""
        return matrix.T if isinstance(self.base, Conv1D) else matrix


class LoraEmbedding(LowRankLayer):
    """A frozen embedding with one low-rank update beside it: `y = W[x] + s · Aᵀ[x] Bᵀ`.

    `x` integers [...] → [..., size]; `lora_A` [rank, vocabulary], `lora_B` [size, rank]. An output
    head that is tied to the embedding is not changed. There is nothing that dropout could drop.
    """

    kind = "embedding"
    drops = False
    base: nn.Embedding

    @classmethod
    def refusal(cls, base: nn.Module, rank: int, *, whole: bool) -> str | None:
        """An embedding that shortens its vectors as they are read has no fixed weight."""
        if getattr(base, "max_norm", None) is not None:
            return "is an embedding with max_norm, which changes its weight as it is read"
        return None

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> tuple[Shape, Shape]:
        """[rank, vocabulary] and [size, rank]."""
        vocabulary, size = cast(Tensor, base.weight).shape
        return (rank, vocabulary), (size, rank)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Aᵀ[x] Bᵀ, by the factor that some models (Gemma) put on their embeddings."""
        update = linear(nn.functional.embedding(x, A.T, padding_idx=self.base.padding_idx), B)
        factor = getattr(self.base, "embed_scale", None)
        return update if factor is None else update * factor

    def beginning(self, method: bool | str) -> Initialization:
        """Where the base stays as it is, A is the one that is zero."""
        return embedding if method in (True, "gaussian") else super().beginning(method)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """[vocabulary, size] → [size, vocabulary]."""
        return weight.T

    def as_weight(self, matrix: Tensor) -> Tensor:
        """[size, vocabulary] → [vocabulary, size]."""
        return matrix.T


_GROUPED = "is a convolution of {} groups, whose update is no change of its weight"


class LoraConv2d(LowRankLayer):
    """A frozen convolution with a narrow one beside it: `y = W * x + s · B * (A * x)`.

    `x` [batch, in, height, width] → [batch, out, …]; `lora_A` [rank, in, kernel height, width]
    moves as the base does, `lora_B` [out, rank / groups, 1, 1] mixes. Where the base has groups, A
    reads all inputs and B is grouped, as in PEFT: such an update cannot be merged.
    """

    kind = "conv2d"
    base: nn.Conv2d

    @classmethod
    def refusal(cls, base: nn.Module, rank: int, *, whole: bool) -> str | None:
        """What PEFT's layer computes otherwise than its merged weight would, or not at all."""
        base = cast(nn.Conv2d, base)
        if base.dilation != (1, 1) or base.padding_mode != "zeros":
            return "is a convolution with dilation, or padding other than by zeros"
        if rank % base.groups:
            return f"is a convolution of {base.groups} groups, which do not divide the rank {rank}"
        if whole and base.groups > 1:
            return _GROUPED.format(base.groups) + ": it takes standard LoRA alone"
        return None

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> tuple[Shape, Shape]:
        """[rank, in, height, width] and [out, rank / groups, 1, 1]."""
        base = cast(nn.Conv2d, base)
        kernel = (rank, base.in_channels, *base.kernel_size)
        return kernel, (base.out_channels, rank // base.groups, 1, 1)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """B * (A * x)."""
        narrow = conv2d(x.to(A.dtype), A, None, self.base.stride, self.base.padding)
        return conv2d(narrow, B, groups=self.base.groups)

    @torch.no_grad()
    def initialize(self, method: bool | str, generator: Generator) -> None:
        """As every layer; of a grouped convolution, whose B is zero, A alone."""
        if self.base.groups == 1:
            super().initialize(method, generator)
            return
        shape = self.lora_A.flatten(1)  # as wide as an ungrouped weight
        A, _ = self.beginning(method)(shape, self.rank, self.scaling, generator)
        self.lora_A.copy_(A.view_as(self.lora_A))

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The kernel's positions count as inputs."""
        return weight.flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """[out, in · height · width] → [out, in, height, width]."""
        return matrix.reshape(self.base.weight.shape)

    def along_outputs(self, values: Tensor) -> Tensor:
        """[out] → [out, 1, 1]."""
        return values.view(-1, 1, 1)

    def unmergeable(self) -> str | None:
        """Groups: A reads the inputs of all of them."""
        return _GROUPED.format(self.base.groups) if self.base.groups > 1 else None


KINDS: Final[Mapping[type[nn.Module], type[LowRankLayer]]] = {
    nn.Linear: LoraLinear,
    Conv1D: LoraLinear,
    nn.Embedding: LoraEmbedding,
    nn.Conv2d: LoraConv2d,
}

WHAT: Final = "linear layers, embeddings and two-dimensional convolutions"


def kind_of(module: nn.Module | None) -> type[LowRankLayer] | None:
    """The class of LoRA layer for `module`, None where it takes none."""
    # nn.MultiheadAttention reads this one's weight and never calls it: LoRA would do nothing.
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    return next((layer for base, layer in KINDS.items() if isinstance(module, base)), None)
