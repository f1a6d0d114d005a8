"""Experts of a mixture in PyTorch: parameters of three dimensions, and their low-rank updates.

As in PEFT 0.21 a parameter is [experts, out, in], or [experts, in, out] where its module has
`is_transposed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from loradeploy.adapter import Adapter
from loradeploy.adapter.delta import expert_updates
from loradeploy.adapter.fit import Layer
from loradeploy.lora.parameters import Overwritten

_DIMENSIONS = 3


@dataclass(frozen=True, eq=False)
class ExpertParameter:
    """A parameter of all experts. `transposed`: it is [experts, in, out]."""

    parameter: nn.Parameter
    transposed: bool

    def layer(self) -> Layer:
        """The sizes of its factors."""
        experts, out, into = self.parameter.shape
        if self.transposed:
            out, into = into, out
        return Layer("experts", (into,), out, experts=experts)


def expert_parameters(model: nn.Module) -> dict[str, ExpertParameter]:
    """The parameters of experts of `model`, by name."""
    return {
        f"{name}.{own}": ExpertParameter(parameter, bool(getattr(module, "is_transposed", False)))
        for name, module, own, parameter in _own_parameters(model)
        if parameter.ndim == _DIMENSIONS
    }


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            yield name, module, own, parameter


@torch.no_grad()
def update_experts(model: nn.Module, adapter: Adapter) -> tuple[Overwritten, ...]:
    """W ← W + s · B A for the experts that `adapter` has factors of; returns what undoes it.

    The adapter must fit.
    """
    parameters = expert_parameters(model)
    done = []
    for name, pair in adapter.factors.items():
        if pair.kind == "experts":
            found = parameters[name]
            W = found.parameter
            done.append(Overwritten(W, W.detach().clone()))
            update = torch.tensor(expert_updates(pair, adapter.scaling(name)))
            W.add_((update if found.transposed else update.mT).to(W))
    return tuple(reversed(done))
