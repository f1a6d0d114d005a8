"""Weights that have factors and no LoRA layer: those of modules that are no linear layers.

A mixture's router is one. Its factors are added to its weight [out, in].
"""

from __future__ import annotations

from torch import nn

from loradeploy.adapter.fitting.fit import Layer
from loradeploy.lora.experts import own_parameters
from loradeploy.lora.layers.kinds import kind_of

_DIMENSIONS = 2


def bare_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights [out, in] of modules that are no linear layers, by module."""
    return {
        name: parameter
        for name, module, own, parameter in own_parameters(model)
        if own == "weight"
        and parameter.ndim == _DIMENSIONS
        and kind_of(module) is None
        and not isinstance(module, nn.Linear)
    }


def bare_layer(weight: nn.Parameter) -> Layer:
    """The sizes of the factors of a weight in `bare_weights`."""
    out, into = weight.shape
    return Layer("linear", (into,), out, shifted=False, refusal=_no_dora)


def _no_dora(rank: int, whole: bool) -> str | None:
    return "is not a linear layer, and only these take DoRA" if whole else None
