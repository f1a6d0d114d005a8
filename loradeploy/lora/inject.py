"""Inject an adapter into a PyTorch model, extract it as data, and restore the base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loradeploy.adapter import Adapter, AdapterConfig, Factors, match_targets, scaling
from loradeploy.adapter.adapter import Rows
from loradeploy.adapter.fitting.fit import check_fit
from loradeploy.adapter.fitting.settle import without_idle
from loradeploy.errors import UsageError, listed, listed_names, shown
from loradeploy.lora.base.vocabulary import refuse_rows_of_tied
from loradeploy.lora.fit import adaptable
from loradeploy.lora.layers.kinds import SUPPORTED, kind_of
from loradeploy.lora.layers.low_rank import LowRankLayer
from loradeploy.lora.layers.targets import linear_modules
from loradeploy.lora.parameters import (
    Overwritten,
    Swap,
    overwrite,
    saved_names,
    swap_in,
    update_parameters,
)
from loradeploy.lora.standard import doubled
from loradeploy.lora.submodels import named_as_in

_LISTED = 8


@dataclass(frozen=True, eq=False)
class Injection:
    """An adapter inside a model.

    `layers`: the LoRA layers by target module. `saved`: the current fully trained parameters
    (modules_to_save, biases), by the base's names; `swaps`: the original ones. `overwritten`:
    parameters of the base that were overwritten by `carried` and `rows` of the adapter, or to which
    the updates of `added` were added (experts, and weights such as a router's).
    """

    model: nn.Module
    config: AdapterConfig
    layers: Mapping[str, LowRankLayer]
    saved: Mapping[str, nn.Parameter]
    swaps: tuple[Swap, ...]
    overwritten: tuple[Overwritten, ...] = ()
    carried: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    rows: Mapping[str, Rows] = dataclasses.field(default_factory=dict)
    added: Mapping[str, Factors] = dataclasses.field(default_factory=dict)

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, without duplicates."""
        found: list[nn.Parameter] = []
        for layer in self.layers.values():
            found += [layer.lora_A, layer.lora_B]
            found += [p for p in (layer.magnitude, layer.lora_bias) if p is not None]
        return list({id(p): p for p in [*found, *self.saved.values()]}.values())

    def adapter(
        self,
        *,
        base_digest: str | None = None,
        labels: tuple[str, ...] | None = None,
        problem_type: str | None = None,
    ) -> Adapter:
        """The adapter as data, a float32 copy on the host, for the unchanged base.

        After PiSSA or OLoRA the factors have twice the rank, and include the part that the
        initialization subtracted from the base.
        """
        changed = any(layer.taken_A is not None for layer in self.layers.values())
        return Adapter(
            config=doubled(self.config) if changed else self.config,
            factors={
                **{module: _factors(layer) for module, layer in self.layers.items()},
                **self.added,
            },
            saved={name: _array(parameter) for name, parameter in self.saved.items()},
            base_digest=base_digest,
            labels=labels,
            carried=self.carried,
            rows=self.rows,
            problem_type=problem_type,
        )

    def merge(self) -> None:
        """Add every update to its base weight.

        Raises:
            UsageError: an update cannot be merged into its base weight; then none is merged.
        """
        problems = [
            f"{name} {reason}"
            for name, layer in self.layers.items()
            if (reason := layer.unmergeable()) is not None
        ]
        if problems:
            raise UsageError(f"the adapter cannot be merged: {listed(problems, _LISTED)}")
        for layer in self.layers.values():
            layer.merge()

    def unmerge(self) -> None:
        """Restore every base weight, bit for bit."""
        for layer in self.layers.values():
            layer.unmerge()

    def remove(self) -> None:
        """Restore the model's original layers and parameters, bit for bit."""
        self.unmerge()
        for module, layer in self.layers.items():
            _replace(self.model, module, layer.base)
        for swap in self.swaps:
            swap.undo()
        for parameter in self.overwritten:
            parameter.undo()


def inject(model: nn.Module, config: AdapterConfig, *, seed: int = 0) -> Injection:
    """Freeze `model` and inject a new adapter, initialized by `config.init_lora_weights`.

    The outputs stay those of the base: one factor is random by `seed` and the other zero, or both
    are a part of the base's weight that is subtracted from it (PiSSA, OLoRA).

    Raises:
        UsageError: no module matches the targets (candidates are listed), a target does not support
            LoRA of this rank, modules_to_save matches nothing, the initialization is not supported,
            or the model already has an adapter.
    """
    _check_free(model)
    targets = _targets(model, config)
    transposed = any(isinstance(layer, Conv1D) for layer in targets.values())
    config = dataclasses.replace(config, fan_in_fan_out=transposed)
    injection = _install(model, config, targets, saved_names(model, config, targets))
    generator = torch.Generator().manual_seed(seed)
    try:
        for layer in injection.layers.values():
            layer.initialize(config.init_lora_weights, generator)
    except UsageError:
        injection.remove()
        raise
    return injection


def load(model: nn.Module, adapter: Adapter) -> Injection:
    """Freeze `model` and inject `adapter`.

    Raises:
        AdapterError: the adapter applies to a base that its initialization changed.
        AdapterMismatchError: the adapter does not fit; the message lists the mismatches.
        UsageError: the model already has an adapter.
    """
    _check_free(model)
    modules = dict(model.named_modules())
    base = adaptable(model)
    adapter = without_idle(named_as_in(model, adapter), base.layers)
    check_fit(adapter, base)
    refuse_rows_of_tied(model, adapter)
    overwritten = overwrite(model, adapter)
    updated = update_parameters(model, adapter)
    injection = _install(
        model,
        adapter.config,
        {name: modules[name] for name in adapter.modules if name not in updated},
        sorted(adapter.saved),
    )
    copy_into(injection, adapter)
    return dataclasses.replace(
        injection,
        overwritten=(*updated.values(), *overwritten),
        carried=adapter.carried,
        rows=adapter.rows,
        added={name: adapter.factors[name] for name in updated},
    )


@torch.no_grad()
def copy_into(injection: Injection, adapter: Adapter) -> None:
    """Copy the values of `adapter`, with the same targets and shapes, into `injection`.

    This restores the result of an earlier `injection.adapter()`, for every initialization.
    """
    for name, layer in injection.layers.items():
        pair = adapter.factors[name]
        A, B = torch.tensor(pair.A), torch.tensor(pair.B)
        if layer.taken_A is not None:
            layer.take(A[layer.rank :].to(layer.lora_A), B[:, layer.rank :].to(layer.lora_B))
            A, B = A[: layer.rank], B[:, : layer.rank]
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
        if layer.magnitude is not None and pair.magnitude is not None:
            layer.magnitude.copy_(torch.tensor(pair.magnitude))
        if layer.lora_bias is not None and pair.bias is not None:
            layer.lora_bias.copy_(torch.tensor(pair.bias))
    for name, parameter in injection.saved.items():
        parameter.copy_(torch.tensor(adapter.saved[name]))


@contextmanager
def adapted(model: nn.Module, adapter: Adapter | None) -> Iterator[nn.Module]:
    """`model` with `adapter` injected (None: the base) inside the context."""
    if adapter is None:
        yield model
        return
    injection = load(model, adapter)
    try:
        yield model
    finally:
        injection.remove()


def _check_free(model: nn.Module) -> None:
    if any(isinstance(module, LowRankLayer) for module in model.modules()):
        raise UsageError("the model already has an adapter: remove() it first")


def _targets(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    candidates = linear_modules(model, config)
    matched = match_targets(modules, config, linear_names=candidates)
    if not matched:
        endings = sorted({name.rpartition(".")[2] for name in candidates})
        fewer = [n for n in ("exclude_modules", "layers_to_transform") if getattr(config, n)]
        named = config.target_modules
        targets = list(named) if isinstance(named, tuple) else named
        raise UsageError(
            f"`target_modules` {shown(targets)} match nothing in this model"
            f"{' with this ' + ' and '.join(fewer) if fewer else ''};"
            f" its linear layers end in: {listed_names(endings, 8, none='it has none')}"
        )
    whole = config.use_dora or config.changes_base
    for name in matched:
        kind = kind_of(modules[name])
        if kind is None:
            named = type(modules[name]).__name__
            raise UsageError(
                f"the target module {name} is a {named}: LoRA supports only {SUPPORTED}"
            )
        reason = kind.refusal(modules[name], config.rank_of(name), whole=whole)
        if reason is not None:
            raise UsageError(f"the target module {name} {reason}")
    return {name: modules[name] for name in matched}


def _install(
    model: nn.Module,
    config: AdapterConfig,
    targets: Mapping[str, nn.Module],
    saved: Iterable[str],
) -> Injection:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    copies, swaps = swap_in(model, saved)
    layers = {}
    for name, module in targets.items():
        kind = kind_of(module)
        if kind is None:
            raise TypeError(f"{name} does not support LoRA")
        layer = kind(
            module,
            config.rank_of(name),
            scaling(config, name),
            config.lora_dropout,
            dora=config.use_dora,
            biased=config.lora_bias,
        )
        layer.train(model.training)
        _replace(model, name, layer)
        layers[name] = layer
    return Injection(model, config, layers, copies, swaps)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _factors(layer: LowRankLayer) -> Factors:
    A, B = layer.factors()
    magnitude = None if layer.magnitude is None else _array(layer.magnitude)
    bias = None if layer.lora_bias is None else _array(layer.lora_bias)
    return Factors(A=_array(A), B=_array(B), magnitude=magnitude, kind=layer.kind, bias=bias)


def _array(parameter: Tensor) -> NDArray[np.float32]:
    return np.array(parameter.detach().float().cpu().numpy())
