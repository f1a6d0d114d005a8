"""The linear layers of a model, as "all-linear" selects them."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loradeploy.adapter import AdapterConfig
from loradeploy.adapter.tasks import CLASSIFIER_HEADS

# The weight of nn.Linear is [out, in], that of transformers' Conv1D [in, out].
LINEAR_LAYERS: Final = (nn.Linear, Conv1D)
_FORWARD_PASSES: Final = tuple(layer.forward for layer in LINEAR_LAYERS)


def linear_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    """The modules of "all-linear": every linear layer but the output head, as in PEFT."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {output} if output is not None else set()
    if not heads and config.task_type == "SEQ_CLS":
        heads = {getattr(model, name, None) for name in CLASSIFIER_HEADS}
    return [
        name for name, module in model.named_modules() if is_linear(module) and module not in heads
    ]


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer.

    A subclass may compute something else: PhiMoE's router returns three tensors, and DeepSeek-V4's
    grouped projection takes groups of inputs.
    """
    if not isinstance(module, LINEAR_LAYERS):
        return False
    weight = module.weight
    if type(module).forward in _FORWARD_PASSES or not weight.is_floating_point():  # or quantized
        return True
    into, out = weight.shape if isinstance(module, Conv1D) else reversed(weight.shape)
    with torch.no_grad(), suppress(Exception):
        y = module(weight.new_zeros((1, into)))
        return torch.is_tensor(y) and y.shape == (1, out)
    return False
