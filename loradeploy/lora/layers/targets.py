"""The linear layers of a model, as "all-linear" selects them."""

from __future__ import annotations

from typing import Final

from torch import nn
from transformers.pytorch_utils import Conv1D

from loradeploy.adapter import AdapterConfig
from loradeploy.adapter.tasks import CLASSIFIER_HEADS

# The weight of nn.Linear is [out, in], that of transformers' Conv1D [in, out].
LINEAR_LAYERS: Final = (nn.Linear, Conv1D)


def linear_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    """The modules of "all-linear": every linear layer but the output head, as in PEFT."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {output} if output is not None else set()
    if not heads and config.task_type == "SEQ_CLS":
        heads = {getattr(model, name, None) for name in CLASSIFIER_HEADS}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_LAYERS) and module not in heads
    ]
