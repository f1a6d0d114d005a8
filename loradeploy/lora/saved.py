"""Parameters that are trained whole: those of modules_to_save, and biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from loradeploy.adapter import AdapterConfig
from loradeploy.adapter.targets import is_saved, is_trained_bias
from loradeploy.errors import UsageError, shown


@dataclass(frozen=True, eq=False)
class Swap:
    """Where a parameter of the base was, to put it back."""

    module: nn.Module
    attribute: str
    original: Tensor

    def undo(self) -> None:
        """Put the base's own parameter back: a tie to another module's is there again."""
        setattr(self.module, self.attribute, self.original)


def saved_names(model: nn.Module, config: AdapterConfig, targets: Container[str]) -> list[str]:
    """The parameters of `model` that `config` trains whole, in the model's order.

    Raises:
        UsageError: modules_to_save names what the model has not.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = {name for name in names if is_trained_bias(name, targets, config)}
    for module in config.modules_to_save:
        only = dataclasses.replace(config, modules_to_save=(module,))
        inside = {name for name in names if is_saved(name, only)}
        if not inside:
            raise UsageError(f"modules_to_save names {shown(module)}, which this model has not")
        found |= inside
    return [name for name in names if name in found]


def swap_in(
    model: nn.Module, names: Iterable[str]
) -> tuple[Mapping[str, nn.Parameter], tuple[Swap, ...]]:
    """Put a trainable copy in the place of each parameter of `names`; the copies, and the way back.

    A weight that is tied to another module's is untied by that, as in PEFT: an output head trained
    whole leaves the embedding as it is. Biases that are one stay one.
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
