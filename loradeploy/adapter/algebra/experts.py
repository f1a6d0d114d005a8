"""Factors of parameters: PEFT's `target_parameters`, most often of a mixture's experts.

PEFT wraps the module that owns the parameters once per parameter. The parameter that was registered
first has the innermost wrapper:

    M.lora_A.weight              [experts · rank, in]   the last parameter; ordered expert, rank
    M.lora_B.weight              [out, rank · experts]                      ordered rank, expert
    M.base_layer.lora_A.weight   …                      the parameter before it

    W[e] ← W[e] + s · B_e A_e        with s = α / rank, as for a linear layer

The keys do not contain the parameter's name. It follows from the order of registration in
transformers' modules. loradeploy stores the factors by parameter, `M.gate_up_proj`, and orders A
like B: rank, expert.

A matrix `M.weight`, such as that of a router, has the factors of a linear layer M.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.adapter import Factors
from loradeploy.adapter.config import PARAMETERS, AdapterConfig
from loradeploy.adapter.modules.patterns import endings

if TYPE_CHECKING:
    from numpy.typing import NDArray

_VERSION: Final = "peft_version"
# The first version of PEFT that does not swap input and output dimensions.
_UNSWAPPED: Final = (0, 19)
# The entry in an adapter's config that says so.
_SAVED_UNSWAPPED: Final = {_VERSION: ".".join(map(str, (*_UNSWAPPED, 0)))}
# In the order of registration in transformers' modules of experts.
_ORDER: Final = ("gate_up_proj", "up_proj", "down_proj")
# The ending of the names of transformers' modules that own parameters of experts.
_MODULE: Final = ".experts"
_WRAPPER: Final = ".base_layer"


def targeted(parameters: Iterable[str], config: AdapterConfig) -> list[str]:
    """The `parameters` that `target_parameters` lists, by full name or by ending."""
    names = config.target_parameters
    return [parameter for parameter in parameters if not names.isdisjoint(endings(parameter))]


def parameters_below(modules: Iterable[str], config: AdapterConfig) -> dict[str, str] | str:
    """Map each of `modules`, which have factors in a file, to its parameter; or return the problem.

    Modules without an entry in `target_parameters` are left out.
    """
    depths: dict[str, set[int]] = {}
    for module in modules:
        name = module.replace(_WRAPPER, "")
        depths.setdefault(name, set()).add(module.count(_WRAPPER))
    owners: dict[str, set[str]] = {}
    for name in config.target_parameters:
        owner, _, own = name.rpartition(".")
        owners.setdefault(owner, set()).add(own)
    found: dict[str, str] = {}
    for module, levels in depths.items() if owners else ():
        owned = set().union(*(owners.get(end, ()) for end in endings(module)))
        # PEFT writes names without a module when it converts linear layers of experts.
        if module.endswith(_MODULE):
            owned |= owners.get("", set())
        if not owned:
            continue
        if len(owned) > 1 and not owned.issubset(_ORDER):
            return (
                f"{module} has factors of {', '.join(sorted(owned))}, whose order is not known:"
                " merge it with PEFT and export the merged model"
            )
        if levels != set(range(len(owned))):
            return (
                f"{module} has factors of {len(levels)} parameters, target_parameters {len(owned)}"
            )
        ordered = sorted(owned, key=lambda n: _ORDER.index(n) if n in _ORDER else 0, reverse=True)
        for depth, name in enumerate(ordered):
            found[module + depth * _WRAPPER] = f"{module}.{name}"
    return found


def expert_factors(
    A: NDArray[Any], B: NDArray[Any], rank: int, config: AdapterConfig
) -> Factors | str:
    """The factors from PEFT's A [experts · rank, in] and B [out, rank · experts]; or the problem.

    A parameter without experts, [out, in], has those of a linear layer.

    Before 0.19, PEFT swapped the input and output dimensions of most parameters. If they differ,
    such factors do not fit the base; if they are equal, only PEFT's version shows the swap.
    """
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] % rank:
        return f"has factors {list(A.shape)} and {list(B.shape)} of experts, of rank {rank}"
    experts = A.shape[0] // rank
    if experts == 1:
        return Factors(A=A, B=B)
    if A.shape[1] == B.shape[0] and _version(config) < _UNSWAPPED:
        return (
            f"has factors of experts of {A.shape[1]} inputs and as many outputs, saved by PEFT"
            f" {config.extra.get(_VERSION) or 'of an unknown version'}: before 0.19 it swapped the"
            " two. Merge it with that PEFT and export the merged model"
        )
    return Factors(A=_reordered(A, experts), B=B, kind="experts", experts=experts)


def _version(config: AdapterConfig) -> tuple[int, ...]:
    """The version of PEFT that saved the adapter; (0,) if it is unknown."""
    found = re.match(r"(\d+)\.(\d+)", str(config.extra.get(_VERSION) or ""))
    return (0,) if found is None else tuple(map(int, found.groups()))


def peft_tensors(factors: Mapping[str, Factors]) -> dict[str, NDArray[Any]]:
    """PEFT's tensors, by key, for the factors of experts in `factors`."""
    tensors = {}
    modules: dict[str, list[str]] = {}
    for parameter, pair in factors.items():
        if pair.kind == "experts":
            modules.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    for module, parameters in modules.items():
        names = [name.rpartition(".")[2] for name in parameters]
        ordered = sorted(names, key=lambda n: _ORDER.index(n) if n in _ORDER else 0, reverse=True)
        for depth, name in enumerate(ordered):
            pair, place = factors[f"{module}.{name}"], module + depth * _WRAPPER
            tensors[f"{place}.lora_A.weight"] = _reordered(pair.A, pair.rank)
            tensors[f"{place}.lora_B.weight"] = pair.B
    return tensors


def with_targets(config: AdapterConfig, factors: Mapping[str, Factors]) -> AdapterConfig:
    """`config` with exactly the modules of `factors` as targets, by their full names.

    Modules whose weight is in `target_parameters` stay there: PEFT may have no layer for them.
    """
    experts = [name for name, pair in factors.items() if pair.kind == "experts"]
    weights = [name for name in factors if config.targets_weight(name)]
    parameters = sorted([*experts, *(f"{name}.weight" for name in weights)])
    extra = {name: value for name, value in config.extra.items() if name != PARAMETERS}
    return dataclasses.replace(
        config,
        target_modules=tuple(sorted(factors.keys() - {*experts, *weights})),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        extra={
            **extra,
            **({PARAMETERS: parameters} if parameters else {}),
            **(_SAVED_UNSWAPPED if experts else {}),
        },
    )


def _reordered(A: NDArray[Any], outer: int) -> NDArray[Any]:
    """[outer · inner, in] → [inner · outer, in]."""
    return np.ascontiguousarray(A.reshape(outer, -1, A.shape[1]).swapaxes(0, 1).reshape(A.shape))
