"""The layers that take LoRA, and the class of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from loradeploy.lora.layers.convolution import LoraConv2d
from loradeploy.lora.layers.embedding import LoraEmbedding
from loradeploy.lora.layers.linear import LoraLinear
from loradeploy.lora.layers.low_rank import LowRankLayer
from loradeploy.lora.layers.targets import is_linear

KINDS: Final[Mapping[type[nn.Module], type[LowRankLayer]]] = {
    nn.Linear: LoraLinear,
    Conv1D: LoraLinear,
    nn.Embedding: LoraEmbedding,
    nn.Conv2d: LoraConv2d,
}

SUPPORTED: Final = "linear layers, embeddings and two-dimensional convolutions"


def kind_of(module: nn.Module | None) -> type[LowRankLayer] | None:
    """The class of LoRA layer for `module`, or None if it takes none."""
    # nn.MultiheadAttention reads the weight of this layer and never calls it: LoRA would have no
    # effect.
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, nn.Linear) and not is_linear(module):
        return None
    return next((layer for base, layer in KINDS.items() if isinstance(module, base)), None)
