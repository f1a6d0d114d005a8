"""Put an adapter into a PyTorch model, take it out as data, and give the base model back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loradeploy.adapter import Adapter, AdapterConfig, Factors, match_targets, scaling
from loradeploy.errors import AdapterMismatchError, UsageError, listed
from loradeploy.lora.layers import LINEAR_LAYERS, LoraLinear, features

# Heads that "all-linear" leaves alone in classifiers, as PEFT does.
CLASSIFIER_HEADS = ("classifier", "score")
_LISTED = 8


@dataclass(frozen=True, eq=False)
class Injection:
    """An adapter inside a model.

    `layers`: the LoRA layers by target module. `saved`: the parameters of modules_to_save, as they
    are now; `originals` as they were in the base.
    """

    model: nn.Module
    config: AdapterConfig
    layers: Mapping[str, LoraLinear]
    saved: Mapping[str, nn.Parameter]
    originals: Mapping[str, Tensor]

    def parameters(self) -> list[nn.Parameter]:
        """What training changes."""
        factors = [p for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)]
        return factors + list(self.saved.values())

    def adapter(
        self, *, base_digest: str | None = None, labels: tuple[str, ...] | None = None
    ) -> Adapter:
        """The adapter as data, a float32 copy on the host."""
        return Adapter(
            config=self.config,
            factors={
                module: Factors(A=_array(layer.lora_A), B=_array(layer.lora_B))
                for module, layer in self.layers.items()
            },
            saved={name: _array(parameter) for name, parameter in self.saved.items()},
            base_digest=base_digest,
            labels=labels,
        )

    def merge(self) -> None:
        """Fold every update into its base weight."""
        for layer in self.layers.values():
            layer.merge()

    def unmerge(self) -> None:
        """Put every base weight back, bit for bit."""
        for layer in self.layers.values():
            layer.unmerge()

    def remove(self) -> None:
        """Give the model its own layers and saved parameters back, bit for bit."""
        self.unmerge()
        for module, layer in self.layers.items():
            _replace(self.model, module, layer.base)
        with torch.no_grad():
            for name, parameter in self.saved.items():
                parameter.copy_(self.originals[name])
                parameter.requires_grad_(False)


def inject(model: nn.Module, config: AdapterConfig, *, seed: int = 0) -> Injection:
    """Freeze `model` and put a fresh adapter into it: A random by `seed`, B zero.

    Raises:
        UsageError: nothing matches the targets (the candidates are listed), a match is not linear,
            or modules_to_save names nothing, or a weight that is tied to another module's; or the
            model carries an adapter already.
    """
    _check_free(model)
    targets = _targets(model, config)
    saved = _saved_parameters(model, config)
    turned = any(isinstance(layer, Conv1D) for layer in targets.values())
    injection = _install(model, dataclasses.replace(config, fan_in_fan_out=turned), targets, saved)
    generator = torch.Generator().manual_seed(seed)
    for layer in injection.layers.values():
        layer.initialise(generator)
    return injection


def load(model: nn.Module, adapter: Adapter) -> Injection:
    """Freeze `model` and put `adapter` into it.

    Raises:
        AdapterMismatchError: the adapter does not fit; every misfit is in the one message.
        UsageError: the model carries an adapter already.
    """
    _check_free(model)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    problems = []
    for name, pair in sorted(adapter.factors.items()):
        module = modules.get(name)
        if not isinstance(module, LINEAR_LAYERS):
            problems.append(f"{name} is no linear layer of this model")
        elif (pair.A.shape[1], pair.B.shape[0]) != features(module):
            into, out = features(module)
            problems.append(
                f"{name} takes [{into}] and gives [{out}], the adapter has"
                f" lora_A {list(pair.A.shape)} and lora_B {list(pair.B.shape)}"
            )
    for name, values in sorted(adapter.saved.items()):
        if name not in parameters:
            problems.append(f"{name} is no parameter of this model")
        elif tuple(parameters[name].shape) != values.shape:
            problems.append(
                f"{name} is {list(values.shape)}, the model has {list(parameters[name].shape)}"
            )
    candidates = [name for name, module in modules.items() if isinstance(module, LINEAR_LAYERS)]
    meant = match_targets(candidates, adapter.config, linear_names=adapter.modules)
    problems += [
        f"{name} is targeted and has no tensors" for name in meant if name not in adapter.factors
    ]
    if problems:
        raise AdapterMismatchError(
            f"the adapter does not fit this model: {listed(problems, _LISTED)}"
        )
    injection = _install(
        model,
        adapter.config,
        {name: modules[name] for name in adapter.modules},
        {name: parameters[name] for name in sorted(adapter.saved)},
    )
    copy_into(injection, adapter)
    return injection


@torch.no_grad()
def copy_into(injection: Injection, adapter: Adapter) -> None:
    """Give what is injected the values of `adapter`, which has the same targets and shapes."""
    for name, layer in injection.layers.items():
        pair = adapter.factors[name]
        layer.lora_A.copy_(torch.tensor(pair.A))
        layer.lora_B.copy_(torch.tensor(pair.B))
    for name, parameter in injection.saved.items():
        parameter.copy_(torch.tensor(adapter.saved[name]))


@contextmanager
def adapted(model: nn.Module, adapter: Adapter | None) -> Iterator[nn.Module]:
    """`model` with `adapter` inside (None is the base) while the context lasts."""
    if adapter is None:
        yield model
        return
    injection = load(model, adapter)
    try:
        yield model
    finally:
        injection.remove()


def linear_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    """What "all-linear" means: every linear layer but the output head, as in PEFT."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {output} if output is not None else set()
    if not heads and config.task_type == "SEQ_CLS":
        heads = {getattr(model, name, None) for name in CLASSIFIER_HEADS}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_LAYERS) and module not in heads
    ]


def _check_free(model: nn.Module) -> None:
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise UsageError("the model carries an adapter already: remove() that one first")


def _targets(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    candidates = linear_modules(model, config)
    matched = match_targets(modules, config, linear_names=candidates)
    if not matched:
        endings = sorted({name.rpartition(".")[2] for name in candidates})
        raise UsageError(
            f"target_modules {config.target_modules!r} match nothing in this model;"
            f" its linear layers end in: {', '.join(endings) or 'there are none'}"
        )
    for name in matched:
        if not isinstance(modules[name], LINEAR_LAYERS):
            kind = type(modules[name]).__name__
            raise UsageError(f"the target module {name} is a {kind}: only linear layers take LoRA")
    return {name: modules[name] for name in matched}


def _saved_parameters(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for saved in config.modules_to_save:
        parameters = {
            name: parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if f".{saved}." in f".{name}"
        }
        if not parameters:
            raise UsageError(f"modules_to_save names {saved!r}, which this model has not")
        for name, parameter in parameters.items():
            if len(owners[id(parameter)]) > 1:
                others = ", ".join(other for other in owners[id(parameter)] if other != name)
                raise UsageError(f"modules_to_save: {name} is tied to {others}; untie them first")
        found.update(parameters)
    return found


def _install(
    model: nn.Module,
    config: AdapterConfig,
    targets: Mapping[str, nn.Module],
    saved: Mapping[str, nn.Parameter],
) -> Injection:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = {}
    for name, module in targets.items():
        layer = LoraLinear(module, config.rank_of(name), scaling(config, name), config.lora_dropout)
        layer.train(model.training)
        _replace(model, name, layer)
        layers[name] = layer
    for parameter in saved.values():
        parameter.requires_grad_(True)
    originals = {name: parameter.detach().clone() for name, parameter in saved.items()}
    return Injection(model, config, layers, saved, originals)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _array(parameter: Tensor) -> NDArray[np.float32]:
    return np.array(parameter.detach().float().cpu().numpy())
