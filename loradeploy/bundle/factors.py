"""An adapter in the form of a bundle's side inputs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.digest import short
from loradeploy.adapter.names import named_as
from loradeploy.adapter.renamings import renamings
from loradeploy.adapter.scaling import with_ranks
from loradeploy.adapter.settle import values_digest, without_copies, without_idle
from loradeploy.adapter.targets import is_saved, match_targets
from loradeploy.bundle.changes import (
    added_biases,
    change_inputs,
    change_misfits,
    changes_undone,
    output_changes,
)
from loradeploy.bundle.labels import with_all_labels
from loradeploy.bundle.manifest import LoraTarget, Manifest
from loradeploy.bundle.names import ADAPTER_MODE, PEFT_TASKS
from loradeploy.errors import AdapterMismatchError, listed, shortened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.base import BaseValues

_LISTED = 6
# Near the root of float32's largest number; all of float16's are smaller.
_OVERFLOWS: Final = 1e18
_BUNDLE: Final = "this bundle"
_ABSENT: Final[Mapping[str, str]] = {
    "linear": "no target module of {noun}",
    "embedding": "an embedding without side inputs in {noun}: export with --side-inputs embedding,"
    " or merge it instead",
    "conv2d": "a convolution, which takes no side inputs: merge it instead",
}


def side_inputs(
    adapter: Adapter, manifest: Manifest, base: BaseValues | None = None
) -> dict[str, NDArray[Any]]:
    """The side inputs of `adapter` alone (one slot), by name, in `manifest.factor_dtype`.

    `M.lora_A` [1, in, rank] = Aᵀ and `M.lora_B` [1, rank, out] = s · Bᵀ, the scaling folded in at
    float32 with one final cast; saved parameters [1, …]; `M.scale` and `M.offset` [1, out] of DoRA
    and of trained biases, which need `base`. Modules that the adapter does not touch are left out:
    the graph's defaults hold for them.

    Raises:
        AdapterMismatchError: the adapter does not fit; every misfit is in the one message.
    """
    adapter = with_all_labels(fitted(adapter, manifest), manifest)
    check_fit(adapter, manifest)
    dtype = np.dtype(manifest.factor_dtype)
    arrays: dict[str, NDArray[Any]] = {}
    for target in manifest.targets:
        own = adapter.factors.get(target.module)
        if own is not None:
            s = np.float32(adapter.scaling(target.module))
            with np.errstate(over="ignore"):  # what overflows is refused below
                A, B = own.A.astype(np.float32).T, own.B.astype(np.float32).T * s
            arrays[target.lora_A] = _slot(A, dtype, target.lora_A)
            arrays[target.lora_B] = _slot(B, dtype, target.lora_B)
    for place in manifest.saved:
        values = adapter.saved.get(place.parameter)
        if values is not None:
            turned = np.swapaxes(values, -1, -2) if place.transposed else values
            arrays[place.input] = _slot(turned, dtype, place.input)
    for name, change in output_changes(adapter, manifest, base).items():
        arrays[name] = _slot(change, dtype, name)
    return arrays


def fitted(adapter: Adapter, manifest: Manifest) -> Adapter:
    """`adapter` as the bundle can take it, for `check_fit` to judge.

    Modules have the names that they have in the graph; copies of the base's own weights, and
    factors that are zero at modules that the graph lacks, are left out. A weight of the base that
    came with the file and is a side input here is one of those that are trained whole, unless
    another module may share it, which would not see it. A merged bundle takes none, and the adapter
    is as it was.

    Raises:
        AdapterMismatchError: it cannot be told which modules of the graph some of its own are.
    """
    if manifest.mode == "merged":
        return adapter
    adapter = named_as(
        adapter, _modules(manifest), lambda: renamings(manifest.submodels, manifest.base_prefix)
    )
    own = manifest.own_weights
    adapter = without_copies(
        adapter, lambda name, values: name in own and own[name] == values_digest(values)
    )
    digests = Counter(own.values())
    places = {t.parameter for t in manifest.saved if digests[own.get(t.parameter, "")] < 2}
    if brought := {n: v for n, v in adapter.carried.items() if n in places}:
        adapter = dataclasses.replace(
            adapter,
            saved={**brought, **adapter.saved},
            carried={n: v for n, v in adapter.carried.items() if n not in places},
        )
    return without_idle(adapter, {target.module for target in manifest.targets})


def _modules(manifest: Manifest) -> set[str]:
    """The modules that the manifest knows of."""
    parameters = (*(saved.parameter for saved in manifest.saved), *manifest.own_weights)
    layers = {t.module for t in manifest.targets} | {o.module for o in manifest.changed}
    return layers | {p.rpartition(".")[0] for p in parameters}


def branch_choice(manifest: Manifest) -> dict[str, NDArray[np.int64]]:
    """What is fed beside side inputs to choose the graph's branch for them; empty without one."""
    return {ADAPTER_MODE: np.ones(1, np.int64)} if manifest.branches else {}


def check_fit(adapter: Adapter, manifest: Manifest, noun: str = _BUNDLE) -> None:
    """Raise AdapterMismatchError unless `adapter` fits the graph that `manifest` tells of.

    `noun` is what the message calls it, where it is no bundle yet. The first misfits are in the
    one message, with the count of the others.

    AdapterError: the factors are for a base that an initialization changed.
    """
    if manifest.mode == "merged":
        raise AdapterMismatchError(
            "this bundle is merged and takes no adapters: export the base without --merge"
        )
    adapter.check_plain()
    adapter = with_all_labels(fitted(adapter, manifest), manifest)
    targets = {target.module: target for target in manifest.targets}
    _refuse(
        [
            *_other_base(adapter, manifest, noun),
            *_factor_misfits(adapter, targets, noun),
            *_saved_misfits(adapter, manifest, noun),
            *not_brought(adapter, (s.parameter for s in manifest.saved if s.lacking)),
            *_base_misfits(adapter, manifest),
            *change_misfits(adapter, manifest, noun),
            *_missing(adapter, targets, manifest),
        ],
        noun,
    )


def check_side_inputs(arrays: Mapping[str, NDArray[Any]], manifest: Manifest) -> None:
    """Raise AdapterMismatchError, with every misfit, unless `arrays` are a slot of side inputs."""
    dtype = np.dtype(manifest.factor_dtype)
    shapes: dict[str, tuple[int, ...]] = {}
    problems = []
    for target in manifest.targets:
        A, B = arrays.get(target.lora_A), arrays.get(target.lora_B)
        if (A is None) != (B is None):
            problems.append(f"{target.module} has one factor without the other")
        elif A is not None and B is not None:
            rank = A.shape[-1]
            shapes[target.lora_A] = (1, target.in_features, rank)
            shapes[target.lora_B] = (1, rank, target.out_features)
    for saved in manifest.saved:
        shapes[saved.input] = (1, *saved.slot_shape)
        if saved.lacking and saved.input not in arrays:
            problems.append(f"{saved.parameter} is not there, which the base lacks too")
    for name, (size, _) in change_inputs(manifest).items():
        shapes[name] = (1, size)
    for name, values in sorted(arrays.items()):
        if name not in shapes:
            problems.append(f"{name} is no side input of this bundle")
        elif values.shape != shapes[name] or values.dtype != dtype:
            problems.append(
                f"{name} is {values.dtype} {list(values.shape)},"
                f" the bundle takes {dtype} {list(shapes[name])}"
            )
    _refuse(problems)


def adapter_from_side_inputs(
    arrays: Mapping[str, NDArray[Any]], manifest: Manifest, base: BaseValues | None = None
) -> Adapter:
    """The adapter whose side inputs are `arrays`: the scaling stays in B, so that alpha is rank.

    Scales and offsets become DoRA's magnitudes and trained biases again, by the weights of `base`.

    Raises:
        AdapterMismatchError: the arrays are not side inputs of the bundle, or `base` lacks weights.
    """
    check_side_inputs(arrays, manifest)
    factors: dict[str, Factors] = {}
    for target in manifest.targets:
        if target.lora_A in arrays:
            A, B = (arrays[name][0].T for name in (target.lora_A, target.lora_B))
            factors[target.module] = Factors(
                np.ascontiguousarray(A), np.ascontiguousarray(B), kind=target.kind
            )
    factors, biases = changes_undone(arrays, factors, manifest, base)
    saved = {}
    for place in manifest.saved:
        if place.input in arrays:
            values = arrays[place.input][0]
            turned = np.swapaxes(values, -1, -2) if place.transposed else values
            saved[place.parameter] = np.ascontiguousarray(turned)
    modules_to_save = tuple(sorted({name.rpartition(".")[0] for name in saved}))
    saved.update(biases)
    blank = AdapterConfig(
        r=1,
        lora_alpha=1,
        target_modules=tuple(sorted(factors)),
        modules_to_save=modules_to_save,
        bias="all" if biases else "none",
        use_dora=any(own.magnitude is not None for own in factors.values()),
        base_model_name_or_path=manifest.base.name,
        task_type=PEFT_TASKS.get(manifest.task),
    )
    ranks = {module: own.rank for module, own in factors.items()}
    config = with_ranks(blank, ranks, dict.fromkeys(ranks, 1.0))
    known = manifest.base.digest if manifest.base.kind == "checkpoint" else None
    return Adapter(config, factors, saved, base_digest=known)


def _refuse(problems: list[str], noun: str = _BUNDLE) -> None:
    if problems:
        raise AdapterMismatchError(f"the adapter does not fit {noun}: {listed(problems, _LISTED)}")


def _other_base(adapter: Adapter, manifest: Manifest, noun: str) -> list[str]:
    base = manifest.base
    if base.kind != "checkpoint" or None in (base.digest, adapter.base_digest):
        return []
    if base.digest == adapter.base_digest:
        return []
    theirs, ours = short(adapter.base_digest), short(base.digest)
    return [
        f"it was trained on another base{_named(adapter)} (digest {theirs}, {noun}'s is {ours})"
    ]


def _named(adapter: Adapter) -> str:
    """The base that the adapter's config names, for a message."""
    name = adapter.config.base_model_name_or_path
    return f", {shortened(name, 60)}" if isinstance(name, str) and name else ""


def _factor_misfits(adapter: Adapter, targets: Mapping[str, LoraTarget], noun: str) -> list[str]:
    problems = []
    linear = all(pair.kind == "linear" for pair in adapter.factors.values())
    if len(adapter.factors) > 1 and linear and targets.keys().isdisjoint(adapter.factors):
        told = (
            f"{shortened(min(adapter.factors))} is {_ABSENT['linear'].format(noun=noun)}, nor are"
            f" the other {len(adapter.factors) - 1}: it was trained on another model"
        )
        return [told + _named(adapter)]
    for module, pair in sorted(adapter.factors.items()):
        target = targets.get(module)
        if target is None or target.kind != pair.kind:
            problems.append(f"{module} is {_ABSENT[pair.kind].format(noun=noun)}")
            continue
        into = math.prod(pair.A.shape[1:])
        if into != target.in_features and pair.groups == 1:
            problems.append(
                f"{module}.lora_A is {list(pair.A.shape)}, the base takes {target.in_features}"
            )
        if pair.B.shape[0] != target.out_features:
            problems.append(
                f"{module}.lora_B is {list(pair.B.shape)}, the base gives {target.out_features}"
            )
    return problems


def _saved_misfits(adapter: Adapter, manifest: Manifest, noun: str) -> list[str]:
    """What is trained whole and has no place; biases that are added are `change_misfits`'."""
    saved = {target.parameter: target for target in manifest.saved}
    added = added_biases(adapter, manifest)
    problems = []
    for parameter, values in sorted(adapter.saved.items()):
        target = saved.get(parameter)
        if target is None and parameter in added:
            continue
        if target is None and not is_saved(parameter, adapter.config):
            problems.append(
                f"{parameter} (a trained bias) is no side input of {noun}: export with"
                " --side-inputs bias, or merge it"
            )
        elif target is None:
            problems.append(
                f"{parameter} (modules_to_save) is no side input of {noun}: merge it instead"
            )
        elif values.shape != target.shape:
            problems.append(
                f"{parameter} is {list(values.shape)}, the base has {list(target.shape)}"
            )
    return problems


def not_brought(adapter: Adapter, lacking: Iterable[str]) -> list[str]:
    """What is wrong where the base lacks the parameters `lacking` and `adapter` does too."""
    return [
        f"{parameter} is in neither the base nor the adapter, so that its outputs would mean"
        " nothing: train it with the adapter (modules_to_save), or use a base that has it"
        for parameter in sorted(set(lacking).difference(adapter.saved, adapter.carried))
    ]


def _base_misfits(adapter: Adapter, manifest: Manifest) -> list[str]:
    """Weights of the base that the adapter brings its own numbers for."""
    problems = []
    for parameter in sorted(adapter.carried):
        known = parameter in manifest.own_weights
        problems.append(
            f"{parameter} came with the adapter and {'differs from' if known else 'may not be'} the"
            " base's: merge it instead"
        )
    problems += [
        f"rows of {parameter} were trained (trainable_token_indices), which is no side input: merge"
        " it instead"
        for parameter in sorted(adapter.rows)
    ]
    return problems


def _missing(adapter: Adapter, targets: Mapping[str, LoraTarget], manifest: Manifest) -> list[str]:
    """What the config names and the tensors lack: half an adapter is no adapter."""
    meant = match_targets(targets, adapter.config, linear_names=tuple(adapter.factors))
    whole = {saved.parameter for saved in manifest.saved}
    return [
        *(f"{m} is targeted and has no tensors" for m in meant if m not in adapter.factors),
        *(
            f"{name} is in modules_to_save and has no tensors"
            for name in sorted(whole)
            if name not in adapter.saved and is_saved(name, adapter.config)
        ),
    ]


def _slot(values: NDArray[Any], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        slot = np.ascontiguousarray(values, dtype=dtype)[np.newaxis]
    if not computable(slot):
        raise AdapterMismatchError(f"{name} does not fit into {dtype}: its values overflow")
    return slot


def computable(values: NDArray[Any]) -> bool:
    """Whether products of `values` and what a model computes are numbers, as far as one can say."""
    most = min(_OVERFLOWS, float(np.finfo(values.dtype).max))
    return bool((np.abs(values) <= most).all())  # False for NaN
