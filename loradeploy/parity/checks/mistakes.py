"""The deliberate mistakes of the negative controls, and the adapters that have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import TOKENS
from loradeploy.adapter.heads import label_parameters
from loradeploy.adapter.modules.targets import is_saved
from loradeploy.parity.phases.fed import Fed

_WRONG_ADAPTER_SEED: Final = 1


@dataclass(frozen=True)
class Mistake:
    """A deliberate mistake."""

    name: str
    meaning: str


@dataclass(frozen=True)
class AdapterMistake(Mistake):
    """A mistake in an adapter. `make` returns the wrong adapter, or None if it does not apply.

    `others`: the same mistake with other modules, each tried only if the ones before are not
    caught: the update of one module may have less effect on the inputs of a check than rounding.
    """

    make: Callable[[Adapter], Adapter | None]
    others: Callable[[Adapter], Iterator[Adapter]] = lambda _: iter(())

    def tries(self, adapter: Adapter) -> Iterator[Adapter]:
        """Return the wrong adapters to try, until one is caught."""
        if (first := self.make(adapter)) is not None:
            yield first
            yield from self.others(adapter)


@dataclass(frozen=True)
class EmbedsMistake(Mistake):
    """A mistake in embeddings that are fed in place of tokens.

    `decoders`: those that it applies to: `ALWAYS` all, `BLOCKS` those in which an image's positions
    attend to each other, `MROPE` those with three-dimensional positions (M-RoPE).
    """

    make: Callable[[Fed], Fed]
    decoders: str


def wrong_adapter(adapter: Adapter) -> Adapter | None:
    """Return another adapter of the same shapes: the values of each factor are shuffled."""
    if not adapter.rows and not any(pair.has_update for pair in adapter.factors.values()):
        return None
    random = np.random.default_rng(_WRONG_ADAPTER_SEED)
    factors = {
        module: dataclasses.replace(pair, A=random.permuted(pair.A), B=random.permuted(pair.B))
        for module, pair in adapter.factors.items()
    }
    rows = {
        parameter: dataclasses.replace(its, values=random.permuted(its.values))
        for parameter, its in adapter.rows.items()
    }
    return dataclasses.replace(adapter, factors=factors, rows=rows)


def doubled_alpha(adapter: Adapter) -> Adapter | None:
    """Return the adapter with its scaling doubled, by doubling B."""
    if not any(pair.has_update for pair in adapter.factors.values()):
        return None
    factors = {module: _scaled(pair, 2) for module, pair in adapter.factors.items()}
    return dataclasses.replace(adapter, factors=factors)


def swapped_factors(adapter: Adapter) -> Adapter | None:
    """Swap the factors of the first two modules of the same shape of which one has an update."""
    first: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    for module, pair in sorted(adapter.factors.items()):
        other = first.setdefault((pair.A.shape, pair.B.shape), module)
        if other != module and (pair.has_effect or adapter.factors[other].has_effect):
            changed = dict(adapter.factors)
            changed[module], changed[other] = changed[other], changed[module]
            return dataclasses.replace(adapter, factors=changed)
    return None


def missing_target(adapter: Adapter) -> Adapter | None:
    """Remove the update of the last module that has one."""
    if len(adapter.factors) < 2:
        return None
    return next((_without(adapter, module) for module in _updated(adapter)), None)


def other_missing_targets(adapter: Adapter) -> Iterator[Adapter]:
    """Remove the update of the last module of each other kind, such as down_proj, one at a time."""
    kinds: dict[str, str] = {}
    for module in _updated(adapter):
        kinds.setdefault(module.rpartition(".")[2], module)
    for module in list(kinds.values())[1:]:
        yield _without(adapter, module)


def _updated(adapter: Adapter) -> list[str]:
    """Return the modules that have an update, the last one first."""
    return [module for module in reversed(adapter.modules) if adapter.factors[module].has_update]


def _without(adapter: Adapter, module: str) -> Adapter:
    factors = {**adapter.factors, module: _scaled(adapter.factors[module], 0)}
    return dataclasses.replace(adapter, factors=factors)


def ignored_magnitude(adapter: Adapter) -> Adapter | None:
    """Use DoRA's factors as plain LoRA factors, without the magnitude."""
    if not adapter.config.use_dora:
        return None
    return dataclasses.replace(
        adapter,
        config=dataclasses.replace(adapter.config, use_dora=False),
        factors={
            module: dataclasses.replace(pair, magnitude=None)
            for module, pair in adapter.factors.items()
        },
    )


def ignored_bias(adapter: Adapter) -> Adapter | None:
    """Leave out the trained biases, those of factors too: the base's biases stay."""
    before = adapter.config
    if (before.bias == "none" and not before.lora_bias) or not adapter.factors:
        return None
    kept = {n: values for n, values in adapter.saved.items() if is_saved(n, before)}
    config = dataclasses.replace(before, bias="none", lora_bias=False)
    factors = {m: dataclasses.replace(pair, bias=None) for m, pair in adapter.factors.items()}
    return dataclasses.replace(adapter, config=config, saved=kept, factors=factors)


def ignored_tokens(adapter: Adapter) -> Adapter | None:
    """Leave out the trained embedding rows: the base's rows stay."""
    if not adapter.rows or not (adapter.factors or adapter.saved or adapter.carried):
        return None
    extra = {n: value for n, value in adapter.config.extra.items() if n != TOKENS}
    config = dataclasses.replace(adapter.config, extra=extra)
    return dataclasses.replace(adapter, config=config, rows={})


def swapped_tokens(adapter: Adapter) -> Adapter | None:
    """Give each trained token the embedding row of another trained token."""
    if all(len(rows.indices) < 2 for rows in adapter.rows.values()):
        return None
    rows = {
        parameter: dataclasses.replace(its, values=np.roll(its.values, 1, axis=0))
        for parameter, its in adapter.rows.items()
    }
    return dataclasses.replace(adapter, rows=rows)


def swapped_labels(adapter: Adapter) -> Adapter | None:
    """Give each label of a trained head the weights of another label."""
    heads = [name for name in label_parameters(adapter) if len(adapter.saved[name]) > 1]
    if not heads:
        return None
    biases = (f"{name.removesuffix('weight')}bias" for name in heads)
    rolled = {
        name: np.roll(adapter.saved[name], 1, axis=0)
        for name in (*heads, *biases)
        if name in adapter.saved
    }
    return dataclasses.replace(adapter, saved={**adapter.saved, **rolled})


MISTAKES: Final[tuple[AdapterMistake, ...]] = (
    AdapterMistake("wrong adapter", "another adapter of the same shapes", wrong_adapter),
    AdapterMistake("doubled alpha", "the scaling is twice what it should be", doubled_alpha),
    AdapterMistake("swapped factors", "two modules have each other's factors", swapped_factors),
    AdapterMistake(
        "missing target", "one module has no update", missing_target, other_missing_targets
    ),
    AdapterMistake("ignored magnitude", "DoRA's outputs are not scaled", ignored_magnitude),
    AdapterMistake("ignored bias", "the trained biases are left out", ignored_bias),
    AdapterMistake("ignored tokens", "trained rows of tokens are left out", ignored_tokens),
    AdapterMistake("swapped tokens", "trained tokens have each other's rows", swapped_tokens),
    AdapterMistake("swapped labels", "labels have each other's rows of the head", swapped_labels),
)

OFF_BY_ONE: Final = Mistake(
    "off-by-one row", "each row of a mixed batch has its neighbor's adapter"
)
BASE_ENCODER: Final = Mistake("encoder without adapter", "the encoder's outputs are the base's")

ALWAYS, BLOCKS, MROPE = "always", "blocks", "mrope"

EMBEDS_MISTAKES: Final = (
    EmbedsMistake("shifted places", "embeddings are fed one token too late", Fed.shifted, ALWAYS),
    EmbedsMistake(
        "exchanged embeddings", "images have each other's embeddings", Fed.exchanged, ALWAYS
    ),
    EmbedsMistake(
        "causal images", "an image's positions attend to earlier ones only", Fed.causal, BLOCKS
    ),
    EmbedsMistake("positions of text", "an image's tokens are counted one by one", Fed.flat, MROPE),
    EmbedsMistake("turned positions", "rows and columns are exchanged", Fed.turned, MROPE),
)


def _scaled(pair: Factors, by: int) -> Factors:
    """The factors of `by` times the update."""
    bias = None if pair.bias is None else pair.bias * by
    return dataclasses.replace(pair, B=pair.B * by, bias=bias)
