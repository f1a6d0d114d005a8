"""The parameters of experts in a PyTorch mixture of experts, and the sizes of their factors.

They have three dimensions. As in PEFT 0.21, a parameter is [experts, out, in], or [experts, in,
out] if its module has `is_transposed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loradeploy.adapter.fitting.fit import Layer

if TYPE_CHECKING:
    from torch import nn

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
        for name, module, own, parameter in own_parameters(model)
        if parameter.ndim == _DIMENSIONS
    }


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """The name of each module of `model`, the module, and its own parameters with their names."""
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            yield name, module, own, parameter
