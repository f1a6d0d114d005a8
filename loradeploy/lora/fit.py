"""Describe a PyTorch model for the check that an adapter fits."""

from __future__ import annotations

from functools import partial

from torch import nn

from loradeploy.adapter.fitting.fit import AdaptableBase, Layer
from loradeploy.lora.bare import bare_layer, bare_weights
from loradeploy.lora.experts import expert_parameters
from loradeploy.lora.layers.kinds import kind_of
from loradeploy.lora.layers.low_rank import LowRankLayer


def adaptable(model: nn.Module) -> AdaptableBase:
    """The layers of `model` that take factors, and all parameters, which adapters can replace."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    layers = {
        name: _layer(kind, module)
        for name, module in model.named_modules()
        if (kind := kind_of(module)) is not None
    }
    layers |= {name: found.layer() for name, found in expert_parameters(model).items()}
    layers |= {name: bare_layer(weight) for name, weight in bare_weights(model).items()}
    users: dict[int, list[str]] = {}
    weights = {
        f"{name}.weight": id(module.weight)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    for parameter, weight in weights.items():
        users.setdefault(weight, []).append(parameter.removesuffix(".weight"))
    return AdaptableBase(
        "this base model",
        layers,
        parameters=shapes,
        weights=shapes,
        row_users={parameter: users[weight] for parameter, weight in weights.items()},
    )


def _layer(kind: type[LowRankLayer], module: nn.Module) -> Layer:
    (_, *inputs), (outputs, *_) = kind.shapes(module, rank=1)
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    refusal = partial(_refusal, kind, module)
    return Layer(kind.kind, tuple(inputs), outputs, groups, refusal=refusal)


def _refusal(kind: type[LowRankLayer], module: nn.Module, rank: int, whole: bool) -> str | None:
    return kind.refusal(module, rank, whole=whole)
