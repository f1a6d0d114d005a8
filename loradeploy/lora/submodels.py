"""Rename an adapter's modules to those of a PyTorch model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loradeploy.adapter import Adapter
from loradeploy.adapter.fitting.parts import without_masked_lm_head
from loradeploy.adapter.modules.names import named_as
from loradeploy.adapter.modules.renamings import Renaming, Submodel, renamings
from loradeploy.lora.experts import expert_parameters

if TYPE_CHECKING:
    from torch import nn


def submodels(model: nn.Module) -> tuple[Submodel, ...]:
    """The transformers models inside `model`. If it is one itself, it is the first."""
    from transformers import PreTrainedModel

    return tuple(
        Submodel(path, type(module).__name__, module.config.model_type or "")
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    )


def named_as_in(model: nn.Module, adapter: Adapter) -> Adapter:
    """`adapter` with its modules named as in `model`.

    Raises:
        AdapterMismatchError: as `adapter.modules.names.named_as`.
    """

    def rules() -> tuple[Renaming, ...]:
        return renamings(submodels(model), getattr(model, "base_model_prefix", ""))

    modules = {name for name, _ in model.named_modules()}
    adapter = without_masked_lm_head(adapter, modules)
    return named_as(adapter, modules.union(expert_parameters(model)), rules)
