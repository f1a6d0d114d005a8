"""Combine adapters of one base into one adapter: weighted sums, or differences."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors, Rows
from loradeploy.adapter.algebra.delta import matrices
from loradeploy.adapter.algebra.experts import with_targets
from loradeploy.adapter.algebra.reduce import reduce_rank
from loradeploy.adapter.config import PARAMETERS, TOKENS, AdapterConfig
from loradeploy.adapter.files.digest import short, tensors_digest
from loradeploy.adapter.files.peft import load_adapter
from loradeploy.adapter.fitting.settle import same_numbers, same_values
from loradeploy.adapter.scaling import with_ranks
from loradeploy.errors import AdapterError, UsageError, listed_names, shown
from loradeploy.given_numbers import checked_number

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The factors of one adapter for a module, and their multiplier: weight times s.
Term = tuple[Factors, float]

_Value = TypeVar("_Value")


def combine(
    weights: Mapping[str | os.PathLike[str] | Adapter, float],
    method: str = "cat",
    rank: int | None = None,
) -> Adapter:
    """Return the adapter Σ weight · adapter. A negative weight subtracts its adapter.

    `weights`: by adapter or by the path of an adapter. `method`, as in PEFT's add_weighted_adapter:

    cat      exact: factors are concatenated, ranks add up
    svd      the best adapter of `rank` (None: the highest rank of the adapters), by `reduce_rank`
    linear   A and B are summed separately, each scaled by √|weight · s|: the rank stays the same,
             but the result is near the sum only for similar adapters; needs equal ranks

    A module counts as zero in an adapter that lacks it. Fully trained parameters (modules_to_save,
    biases, rows of tokens) cannot be added: they are copied from the adapter that has them.
    Weights of the base in an adapter's file are kept if all adapters have equal ones.

    Raises:
        UsageError: no adapters, an unknown method, a weight that is not finite, or `rank` without
            method svd.
        AdapterError: DoRA adapters, whose magnitudes cannot be added; different bases; factors of
            different shapes; two adapters that have fully trained the same parameter, or whose
            files have different weights of the base.
    """
    if not isinstance(method, str) or method not in _METHODS:
        raise UsageError(f"`method` {shown(method)} is unknown: use {', '.join(_METHODS)}")
    if rank is not None and method != "svd":
        raise UsageError(f"`rank` needs method svd: {method} determines the rank")
    adapters = _read(weights)
    biased = any(adapter.config.lora_bias for _, adapter, _ in adapters)
    terms: dict[str, list[Term]] = {}
    for _, adapter, weight in adapters:
        for module, pair in adapter.factors.items():
            terms.setdefault(module, []).append((pair, weight * adapter.scaling(module)))
    factors = {}
    for module in sorted(terms):
        _check_shapes(module, [pair for pair, _ in terms[module]])
        pair = _METHODS[method](module, terms[module])
        factors[module] = dataclasses.replace(pair, bias=_bias(terms[module], biased=biased))
    found = [adapter for _, adapter, _ in adapters]
    rows, tokens = _rows(adapters)
    config = _config([adapter.config for adapter in found], factors)
    combined = Adapter(
        config=dataclasses.replace(config, extra={**config.extra, **tokens}),
        factors=factors,
        saved=_saved(adapters),
        base_digest=_common("different bases", [a.base_digest for a in found], short),
        labels=_common("different labels", [a.labels for a in found], str),
        carried=_carried(adapters),
        rows=rows,
        problem_type=_common("different problem types", [a.problem_type for a in found], str),
        part_of=_combined_part_of(adapters, method),
    )
    if method != "svd":
        return combined
    highest = max((p.rank for a in found for p in a.factors.values()), default=1)
    return reduce_rank(combined, rank or highest)[0]


def _read(
    weights: Mapping[str | os.PathLike[str] | Adapter, float],
) -> list[tuple[str, Adapter, float]]:
    """The adapters with their names and weights, which can be added."""
    if not isinstance(weights, Mapping):
        raise UsageError(f"`weights` is {shown(weights)}: give a mapping of adapters to weights")
    if not weights:
        raise UsageError("no adapters to combine")
    for key, weight in weights.items():
        if not isinstance(key, str | os.PathLike | Adapter):
            raise UsageError(f"`weights` names {shown(key)}: give adapters, or their paths")
        number = checked_number(weight)
        if number is None or not math.isfinite(number):
            raise UsageError(f"{_name(key)} has the weight {shown(weight)}: give a finite number")
    adapters = [
        (_name(key), key if isinstance(key, Adapter) else load_adapter(key), float(weight))
        for key, weight in weights.items()
    ]
    for name, adapter, _ in adapters:
        adapter.check_plain()
        if adapter.config.use_dora:
            raise AdapterError(f"{name} is a DoRA adapter, whose magnitudes cannot be added")
    return adapters


def _combined_part_of(adapters: Sequence[tuple[str, Adapter, float]], method: str) -> str | None:
    """`part_of` of a combination of parts: equal in all bundles that combine them in one way."""
    if all(adapter.part_of is None for _, adapter, _ in adapters):
        return None
    terms = {f"{place}:{a.whole_digest}": w for place, (_, a, w) in enumerate(adapters)}
    return tensors_digest({}, {**terms, f"method={method}": 1.0})


def _cat(module: str, terms: Sequence[Term]) -> Factors:
    shape = terms[0][0]
    if shape.kind == "experts":  # the axis is ordered by rank, then expert, so the ranks add up
        A = np.concatenate([np.float32(s) * pair.A.astype(np.float32) for pair, s in terms])
        B = np.concatenate([pair.B.astype(np.float32) for pair, _ in terms], axis=1)
        return dataclasses.replace(shape, A=A, B=B)
    halves = [matrices(pair) for pair, _ in terms]  # refuses grouped convolutions
    A = np.concatenate([np.float32(s) * A for (A, _), (_, s) in zip(halves, terms, strict=True)])
    B = np.concatenate([B for _, B in halves], axis=1)
    return Factors(
        A=A.reshape(len(A), *shape.A.shape[1:]),
        B=B.reshape(*B.shape, *shape.B.shape[2:]),
        kind=shape.kind,
    )


def _linear(module: str, terms: Sequence[Term]) -> Factors:
    ranks = sorted({pair.rank for pair, _ in terms})
    if len(ranks) > 1:
        raise AdapterError(
            f"{module} has the ranks {listed_names(map(str, ranks))}: method linear needs equal"
            " ones, use cat or svd"
        )
    roots = [np.float32(math.sqrt(abs(s))) for _, s in terms]
    A = sum(
        np.float32(math.copysign(1, s)) * root * pair.A
        for (pair, s), root in zip(terms, roots, strict=True)
    )
    B = sum(root * pair.B for (pair, _), root in zip(terms, roots, strict=True))
    return dataclasses.replace(terms[0][0], A=np.asarray(A), B=np.asarray(B))


_METHODS: Final[Mapping[str, Callable[[str, Sequence[Term]], Factors]]] = {
    "cat": _cat,
    "svd": _cat,
    "linear": _linear,
}


def _bias(terms: Sequence[Term], *, biased: bool) -> NDArray[np.float32] | None:
    """The bias of B: the sum in every method. None unless one of the adapters has `lora_bias`."""
    if not biased or terms[0][0].kind not in ("linear", "conv2d"):
        return None
    total = np.zeros(len(terms[0][0].B), np.float32)
    for pair, s in terms:
        if pair.bias is not None:
            total += np.float32(s) * pair.bias.astype(np.float32)
    return total


def _check_shapes(module: str, pairs: Sequence[Factors]) -> None:
    shapes = {
        (pair.kind, pair.A.shape[1:], pair.B.shape[0], pair.groups, pair.experts) for pair in pairs
    }
    if len(shapes) > 1:
        raise AdapterError(f"the adapters' factors for {module} have different shapes")


def _config(configs: Sequence[AdapterConfig], factors: Mapping[str, Factors]) -> AdapterConfig:
    biases = {config.bias for config in configs}
    blank = AdapterConfig(
        bias=next(bias for bias in ("all", "lora_only", "none") if bias in biases),
        lora_bias=any(config.lora_bias for config in configs),
        modules_to_save=tuple(sorted({m for config in configs for m in config.modules_to_save})),
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        task_type=_first(config.task_type for config in configs),
        base_model_name_or_path=_first(config.base_model_name_or_path for config in configs),
        extra={PARAMETERS: sorted({n for config in configs for n in config.target_parameters})},
    )
    blank = with_targets(blank, factors)
    ranks = {module: pair.rank for module, pair in factors.items()}
    return with_ranks(blank, ranks, dict.fromkeys(ranks, 1.0))


def _saved(adapters: Sequence[tuple[str, Adapter, float]]) -> dict[str, Any]:
    saved: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for name, adapter, weight in adapters:
        for parameter, values in adapter.saved.items():
            if weight <= 0:
                raise AdapterError(
                    f"{name} has fully trained {parameter}, which cannot be subtracted"
                )
            if parameter in saved and not np.array_equal(saved[parameter], values):
                raise AdapterError(
                    f"{owners[parameter]} and {name} have both fully trained {parameter},"
                    " differently: they cannot be combined"
                )
            saved[parameter], owners[parameter] = values, name
    return saved


def _rows(
    adapters: Sequence[tuple[str, Adapter, float]],
) -> tuple[Mapping[str, Rows], dict[str, Any]]:
    """The trained rows of the adapters, which must be equal, and the config's field for them."""
    having = [entry for entry in adapters if entry[1].rows]
    if not having:
        return {}, {}
    first, one, _ = having[0]
    for name, adapter, weight in having:
        parameter = min(adapter.rows)
        if weight <= 0:
            raise AdapterError(
                f"{name} has trained rows of {parameter} (trainable_token_indices), which cannot be"
                " subtracted"
            )
        if not _same_rows(one, adapter):
            raise AdapterError(
                f"{first} and {name} have both trained rows of {parameter}"
                " (trainable_token_indices), differently: they cannot be combined"
            )
    return one.rows, {TOKENS: one.config.extra.get(TOKENS)}


def _same_rows(one: Adapter, other: Adapter) -> bool:
    return (
        one.config.extra.get(TOKENS) == other.config.extra.get(TOKENS)
        and one.rows.keys() == other.rows.keys()
        and all(same_values(rows, other.rows[name]) for name, rows in one.rows.items())
    )


def _carried(adapters: Sequence[tuple[str, Adapter, float]]) -> Mapping[str, NDArray[Any]]:
    """The base weights in the adapters' files, which must be equal in all of them."""
    first, one, _ = adapters[0]
    for name, adapter, _ in adapters[1:]:
        for parameter in sorted({*one.carried, *adapter.carried}):
            ours, theirs = one.carried.get(parameter), adapter.carried.get(parameter)
            if ours is None or theirs is None or not same_numbers(ours, theirs):
                raise AdapterError(
                    f"{parameter} of the base is in {name if ours is None else first}, and"
                    f" differs or is missing in {first if ours is None else name}: the adapters may"
                    " have different bases; if it is the base's weight, save both without it"
                    " (save_embedding_layers=False)"
                )
    return one.carried


def _common(
    what: str, values: Sequence[_Value | None], describe: Callable[[_Value], str]
) -> _Value | None:
    """The value that all adapters with a value share; AdapterError if they have several."""
    known = list(dict.fromkeys(value for value in values if value is not None))
    if len(known) > 1:
        raise AdapterError(
            f"the adapters have {what} and cannot be combined: {listed_names(map(describe, known))}"
        )
    return known[0] if known else None


def _first(values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _name(key: str | os.PathLike[str] | Adapter) -> str:
    return f"the adapter {short(key.digest)}" if isinstance(key, Adapter) else os.fspath(key)
