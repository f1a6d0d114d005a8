"""The parameters of a PyTorch model that have factors without a LoRA layer, and their sizes.

Those of a mixture's experts have three dimensions. As in PEFT 0.21, a parameter is [experts, out,
in], or [experts, in, out] if its module has `is_transposed`. The weight of a router is [out, in].
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
        for name, module, own, parameter in _own_parameters(model)
        if parameter.ndim == _DIMENSIONS
    }


def bare_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights [out, in] of modules that are no linear layers, such as routers, by module."""
    from torch import nn

    from loradeploy.lora.layers.kinds import kind_of

    return {
        name: parameter
        for name, module, own, parameter in _own_parameters(model)
        if own == "weight"
        and parameter.ndim == _DIMENSIONS - 1
        and kind_of(module) is None
        and not isinstance(module, nn.Linear)
    }


def bare_layer(weight: nn.Parameter) -> Layer:
    """The sizes of the factors of a weight in `bare_weights`."""
    out, into = weight.shape
    return Layer("linear", (into,), out, shifted=False, refusal=_no_dora)


def _no_dora(rank: int, whole: bool) -> str | None:
    return "is not a linear layer, and only these take DoRA" if whole else None


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            yield name, module, own, parameter
