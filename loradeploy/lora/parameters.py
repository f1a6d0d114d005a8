"""Fully trained parameters (modules_to_save, biases), and base weights in an adapter's file."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loradeploy.adapter import Adapter, AdapterConfig
from loradeploy.adapter.adapter import Rows
from loradeploy.adapter.algebra.delta import expert_updates, update
from loradeploy.adapter.fitting.settle import same_values
from loradeploy.adapter.modules.targets import is_saved, is_trained_bias
from loradeploy.errors import AdapterMismatchError, UsageError, shown
from loradeploy.lora.bare import bare_weights
from loradeploy.lora.experts import expert_parameters


@dataclass(frozen=True, eq=False)
class Swap:
    """A parameter of the base that was replaced in its module, to restore it."""

    module: nn.Module
    attribute: str
    original: Tensor

    def undo(self) -> None:
        """Restore the base's parameter, tied to other modules as before."""
        setattr(self.module, self.attribute, self.original)


@dataclass(frozen=True, eq=False)
class Overwritten:
    """A parameter of the base whose values were overwritten, with its original values."""

    parameter: Tensor
    original: Tensor

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the base's values, bit for bit."""
        self.parameter.copy_(self.original)


@torch.no_grad()
def overwrite(model: nn.Module, adapter: Adapter) -> tuple[Overwritten, ...]:
    """Overwrite base weights and rows in `model` with those of `adapter`; returns the originals.

    This is in place, as in PEFT: modules that share the parameter change, too. Shapes must fit.

    Raises:
        AdapterMismatchError: two parameters of the adapter are tied in the model, and differ.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    done: list[Overwritten] = []
    groups: list[Mapping[str, NDArray[Any] | Rows]] = [adapter.carried, adapter.rows]
    for group in groups:
        seen: dict[int, str] = {}
        for name, values in sorted(group.items()):
            parameter = parameters[name]
            first = seen.setdefault(id(parameter), name)
            if first != name and not same_values(group[first], values):
                for one in reversed(done):
                    one.undo()
                raise AdapterMismatchError(
                    f"{first} and {name} are tied in this model, and differ in the adapter: give"
                    " the base untied (tie_word_embeddings: false), as it was trained"
                )
            done.append(Overwritten(parameter, parameter.detach().clone()))
            _put(parameter, values)
    return tuple(reversed(done))


@torch.no_grad()
def update_parameters(model: nn.Module, adapter: Adapter) -> dict[str, Overwritten]:
    """W ← W + s · B A for experts and bare weights that `adapter` has factors for.

    Returns the originals by name of the factors. The adapter must fit.
    """
    experts, bare = expert_parameters(model), bare_weights(model)
    done = {}
    for name, pair in adapter.factors.items():
        s = adapter.scaling(name)
        if pair.kind == "experts":
            W, delta = experts[name].parameter, torch.tensor(expert_updates(pair, s))
            delta = delta if experts[name].transposed else delta.mT
        elif name in bare:
            W, delta = bare[name], torch.tensor(update(pair, s))
        else:
            continue
        done[name] = Overwritten(W, W.detach().clone())
        W.add_(delta.to(W))
    return done


def _put(parameter: Tensor, values: NDArray[Any] | Rows) -> None:
    if isinstance(values, Rows):
        parameter[list(values.indices)] = torch.tensor(values.values).to(parameter)
    else:
        parameter.copy_(torch.tensor(values))


def saved_names(model: nn.Module, config: AdapterConfig, targets: Container[str]) -> list[str]:
    """The parameters of `model` that `config` trains in full, in the model's order.

    Raises:
        UsageError: modules_to_save names a module that the model lacks.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = {name for name in names if is_trained_bias(name, targets, config)}
    for module in config.modules_to_save:
        only = dataclasses.replace(config, modules_to_save=(module,))
        inside = {name for name in names if is_saved(name, only)}
        if not inside:
            raise UsageError(f"modules_to_save names {shown(module)}, which this model lacks")
        found |= inside
    return [name for name in names if name in found]


def swap_in(
    model: nn.Module, names: Iterable[str]
) -> tuple[Mapping[str, nn.Parameter], tuple[Swap, ...]]:
    """Replace each parameter in `names` with a trainable copy; returns copies and originals.

    This unties a weight that is tied to another module, as in PEFT: fully training an output head
    does not change the embedding. Tied biases stay tied.
    """
    copies: dict[str, nn.Parameter] = {}
    shared: dict[int, nn.Parameter] = {}
    swaps = []
    for name in names:
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        original = getattr(module, attribute)
        copy = shared.get(id(original))
        if copy is None or attribute != "bias":
            copy = nn.Parameter(original.detach().clone())
            shared[id(original)] = copy
        setattr(module, attribute, copy)
        copies[name] = copy
        swaps.append(Swap(module, attribute, original))
    return copies, tuple(swaps)
