"""Recognize models whose layers are all alike, and shorten such a model to its first layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

# The path of the layers in the base model, by model type: types for which the tests compare a
# repeated program with a trace of all layers.
LAYERS: Final = {
    "bert": "encoder.layer",
    "gpt2": "h",
    "llama": "layers",
    "mistral": "layers",
    "qwen2": "layers",
    "qwen3": "layers",
    "roberta": "encoder.layer",
}
TRACED: Final = 4  # layers
# Attributes in which layers may differ that compute the same.
_NUMBERED: Final = frozenset({"layer_idx"})


@dataclass(frozen=True)
class Layers:
    """The layers of a model, which are all alike. `path`: that of their list in the model."""

    path: str
    count: int


def alike_layers(model: torch.nn.Module) -> Layers | None:
    """The layers of `model`, if they can be repeated; None if all have to be traced."""
    import torch

    config: Any = model.config
    base: Any = getattr(model, "base_model", model)
    inside = LAYERS.get(str(config.model_type))
    kinds = getattr(config, "layer_types", None)
    if inside is None or (kinds is not None and len(set(kinds)) > 1):
        return None
    layers = dict(base.named_modules()).get(inside)
    if not isinstance(layers, torch.nn.ModuleList) or len(layers) <= TRACED + 1:
        return None
    path = next(name for name, module in model.named_modules() if module is layers)
    if len(layers) != config.num_hidden_layers:
        return None
    parameters = [id(p) for p in model.parameters()]
    own = [id(p) for layer in layers for p in layer.parameters()]
    if len(set(own)) != len(own) or not set(own) <= set(parameters):
        return None  # parameters are shared by several layers
    return Layers(path, len(layers)) if all(_alike(layers[0], x) for x in layers) else None


@contextlib.contextmanager
def shortened(model: torch.nn.Module, layers: Layers) -> Iterator[None]:
    """Shorten `model` to its first layers, until the context ends."""
    import torch

    config: Any = model.config
    parent_path, _, own = layers.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    every, kinds = getattr(parent, own), getattr(config, "layer_types", None)
    with contextlib.ExitStack() as restored:
        restored.callback(setattr, config, "num_hidden_layers", layers.count)
        if kinds is not None:
            restored.callback(setattr, config, "layer_types", kinds)
        restored.callback(setattr, parent, own, every)
        setattr(parent, own, torch.nn.ModuleList(list(every)[:TRACED]))
        config.num_hidden_layers = TRACED
        if kinds is not None:
            config.layer_types = kinds[:TRACED]
        yield


def _alike(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two modules have the same modules, settings and shapes, and equal buffers."""
    import torch

    ones, others = list(one.named_modules()), list(other.named_modules())
    if [(n, type(m)) for n, m in ones] != [(n, type(m)) for n, m in others]:
        return False
    for (_, a), (_, b) in zip(ones, others, strict=True):
        if a._forward_hooks or b._forward_hooks or a._forward_pre_hooks or b._forward_pre_hooks:
            return False
        if a.__dict__.keys() != b.__dict__.keys():
            return False
        settings = a.__dict__.keys() - torch.nn.Module().__dict__.keys() - _NUMBERED
        if a.training != b.training or not all(
            equal(getattr(a, n), getattr(b, n)) for n in settings
        ):
            return False
        if [_form(p) for p in a._parameters.items()] != [_form(p) for p in b._parameters.items()]:
            return False
        if a._buffers.keys() != b._buffers.keys():
            return False
        if not all(equal(a._buffers[name], b._buffers[name]) for name in a._buffers):
            return False
    return True


def _form(named: tuple[str, torch.nn.Parameter | None]) -> tuple[Any, ...]:
    name, parameter = named
    if parameter is None:
        return (name,)
    return (name, parameter.shape, parameter.stride(), parameter.dtype, parameter.requires_grad)


def equal(one: Any, other: Any) -> bool:
    """Whether two settings are certainly equal; False for types that cannot be compared."""
    import torch

    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, bool | int | float | str | set | torch.dtype):
        return bool(one == other)
    return False
