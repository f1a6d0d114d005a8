"""Several adapters of one base as one: weighted sums, and differences by negative weights."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors, Rows
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.delta import matrices
from loradeploy.adapter.digest import short
from loradeploy.adapter.peft import load_adapter
from loradeploy.adapter.reduce import reduce_rank
from loradeploy.adapter.scaling import with_ranks
from loradeploy.adapter.settle import same_given, same_numbers
from loradeploy.errors import AdapterError, UsageError, listed_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

# One adapter's factors of a module, and what they are multiplied by: its weight times its s.
Term = tuple[Factors, float]

_Value = TypeVar("_Value")
_TOKENS: Final = "trainable_token_indices"


def combine(
    weights: Mapping[str | os.PathLike[str] | Adapter, float],
    method: str = "cat",
    rank: int | None = None,
) -> Adapter:
    """The adapter Σ weight · adapter; a negative weight takes one away.

    `weights`: by adapter, or by the path of one. `method`, with the meanings of PEFT's
    add_weighted_adapter:

    cat      exact: the factors side by side, the ranks add up
    svd      the best of `rank` (None: the highest of the adapters'), by `reduce_rank`
    linear   A and B are summed each for itself, √|weight · s| on either side: of the same rank and
             size, and near the sum only where the adapters are near each other; equal ranks only

    An adapter that lacks a module adds nothing to it. What is trained whole (modules_to_save,
    biases, rows of tokens) cannot be added: it is taken as it is from the one adapter that has it.
    Weights of the base that came with an adapter stay where all adapters have the same.

    Raises:
        UsageError: no adapters, an unknown method, a weight that is no number, or a rank without
            method svd.
        AdapterError: DoRA's magnitudes, which do not add; other bases; factors that do not fit
            each other; two adapters that have trained the same parameter whole, or whose files
            have other weights of the base.
    """
    if method not in _METHODS:
        raise UsageError(f"method {method!r} is unknown: use {', '.join(_METHODS)}")
    if rank is not None and method != "svd":
        raise UsageError(f"a rank is for method svd, {method} has its own")
    if not weights:
        raise UsageError("there are no adapters to combine")
    for key, weight in weights.items():
        if not math.isfinite(weight):
            raise UsageError(f"{_name(key)} has the weight {weight}, a number is needed")
    adapters = [
        (_name(key), key if isinstance(key, Adapter) else load_adapter(key), float(weight))
        for key, weight in weights.items()
    ]
    for name, adapter, _ in adapters:
        adapter.check_plain()
        if adapter.config.use_dora:
            raise AdapterError(f"{name} is a DoRA adapter, whose magnitudes cannot be added")
    terms: dict[str, list[Term]] = {}
    for _, adapter, weight in adapters:
        for module, pair in adapter.factors.items():
            terms.setdefault(module, []).append((pair, weight * adapter.scaling(module)))
    factors = {}
    for module in sorted(terms):
        _check_shapes(module, [pair for pair, _ in terms[module]])
        factors[module] = _METHODS[method](module, terms[module])
    found = [adapter for _, adapter, _ in adapters]
    rows, tokens = _rows(adapters)
    config = _config([adapter.config for adapter in found], factors)
    combined = Adapter(
        config=dataclasses.replace(config, extra={**config.extra, **tokens}),
        factors=factors,
        saved=_saved(adapters),
        base_digest=_one("a base of their own", [a.base_digest for a in found], short),
        labels=_one("labels of their own", [a.labels for a in found], str),
        carried=_carried(adapters),
        rows=rows,
    )
    if method != "svd":
        return combined
    highest = max((p.rank for a in found for p in a.factors.values()), default=1)
    return reduce_rank(combined, rank or highest)[0]


def _cat(module: str, terms: Sequence[Term]) -> Factors:
    shape = terms[0][0]
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
    return Factors(A=np.asarray(A), B=np.asarray(B), kind=terms[0][0].kind)


_METHODS: Final[Mapping[str, Callable[[str, Sequence[Term]], Factors]]] = {
    "cat": _cat,
    "svd": _cat,
    "linear": _linear,
}


def _check_shapes(module: str, pairs: Sequence[Factors]) -> None:
    shapes = {(pair.kind, pair.A.shape[1:], pair.B.shape[0], pair.groups) for pair in pairs}
    if len(shapes) > 1:
        raise AdapterError(f"the adapters' factors for {module} are of layers of other shapes")


def _config(configs: Sequence[AdapterConfig], factors: Mapping[str, Factors]) -> AdapterConfig:
    biases = {config.bias for config in configs}
    blank = AdapterConfig(
        target_modules=tuple(factors),
        bias=next(bias for bias in ("all", "lora_only", "none") if bias in biases),
        modules_to_save=tuple(sorted({m for config in configs for m in config.modules_to_save})),
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        task_type=_first(config.task_type for config in configs),
        base_model_name_or_path=_first(config.base_model_name_or_path for config in configs),
    )
    ranks = {module: pair.rank for module, pair in factors.items()}
    return with_ranks(blank, ranks, dict.fromkeys(ranks, 1.0))


def _saved(adapters: Sequence[tuple[str, Adapter, float]]) -> dict[str, Any]:
    saved: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for name, adapter, weight in adapters:
        for parameter, values in adapter.saved.items():
            if weight <= 0:
                raise AdapterError(
                    f"{name} has trained {parameter} whole, which cannot be taken away"
                )
            if parameter in saved and not np.array_equal(saved[parameter], values):
                raise AdapterError(
                    f"{owners[parameter]} and {name} have both trained {parameter} whole: what it"
                    " is to be in the combination cannot be told"
                )
            saved[parameter], owners[parameter] = values, name
    return saved


def _rows(
    adapters: Sequence[tuple[str, Adapter, float]],
) -> tuple[Mapping[str, Rows], dict[str, Any]]:
    """The rows of the one adapter that has trained some, and what its config says of them."""
    having = [entry for entry in adapters if entry[1].rows]
    if not having:
        return {}, {}
    first, one, _ = having[0]
    for name, adapter, weight in having:
        parameter = min(adapter.rows)
        if weight <= 0:
            raise AdapterError(
                f"{name} has trained rows of {parameter} (trainable_token_indices), which cannot be"
                " taken away"
            )
        if not _same_rows(one, adapter):
            raise AdapterError(
                f"{first} and {name} have both trained rows of {parameter}"
                " (trainable_token_indices): what they are to be in the combination cannot be told"
            )
    return one.rows, {_TOKENS: one.config.extra.get(_TOKENS)}


def _same_rows(one: Adapter, other: Adapter) -> bool:
    return (
        one.config.extra.get(_TOKENS) == other.config.extra.get(_TOKENS)
        and one.rows.keys() == other.rows.keys()
        and all(same_given(rows, other.rows[name]) for name, rows in one.rows.items())
    )


def _carried(adapters: Sequence[tuple[str, Adapter, float]]) -> Mapping[str, NDArray[Any]]:
    """The base's weights that came with every one of the adapters."""
    first, one, _ = adapters[0]
    for name, adapter, _ in adapters[1:]:
        for parameter in sorted({*one.carried, *adapter.carried}):
            mine, theirs = one.carried.get(parameter), adapter.carried.get(parameter)
            if mine is None or theirs is None or not same_numbers(mine, theirs):
                raise AdapterError(
                    f"{parameter} of the base came with {name if mine is None else first}, and not"
                    f" the same with {first if mine is None else name}: whether they are of one"
                    " base cannot be told; save both without it (save_embedding_layers=False) if"
                    " it is the base's own"
                )
    return one.carried


def _one(
    what: str, values: Sequence[_Value | None], tell: Callable[[_Value], str]
) -> _Value | None:
    known = list(dict.fromkeys(value for value in values if value is not None))
    if len(known) > 1:
        raise AdapterError(
            f"the adapters have {what} and cannot be combined: {listed_names(map(tell, known))}"
        )
    return known[0] if known else None


def _first(values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _name(key: str | os.PathLike[str] | Adapter) -> str:
    return f"the adapter {short(key.digest)}" if isinstance(key, Adapter) else os.fspath(key)
