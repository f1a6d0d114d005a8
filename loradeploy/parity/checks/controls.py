"""Negative controls: deliberate mistakes that the check must catch.

Each mistake is applied to an adapter in PyTorch, and its outputs are compared with the reference
as if they were those of a backend. If a mistake passes, the same mistake in a deployment would not
be noticed with these prompts and tolerances either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import TOKENS
from loradeploy.adapter.heads import label_parameters
from loradeploy.adapter.modules.targets import is_saved
from loradeploy.errors import listed_names
from loradeploy.parity.context import AdapterUnderTest, CheckContext
from loradeploy.parity.figures.metrics import Comparison
from loradeploy.parity.names import EMBEDDED
from loradeploy.parity.phases.fed import Fed
from loradeploy.parity.phases.outputs import has_logits
from loradeploy.parity.reference.model import TorchModel
from loradeploy.parity.reference.pytorch import as_reference_with, reference_rows
from loradeploy.parity.report.results import Control
from loradeploy.parity.verdict import judge

if TYPE_CHECKING:
    from loradeploy.parity.phases.rows import Row
    from loradeploy.parity.reference.pytorch import Base, Reference

_WRONG_ADAPTER_SEED: Final = 1


def _nothing_else(adapter: Adapter) -> Iterator[Adapter]:
    yield from ()


@dataclass(frozen=True)
class Mistake:
    """A deliberate mistake. `make` returns the wrong adapter, or None if it does not apply.

    `others`: the same mistake with other modules, each tried only if the ones before are not
    caught: the update of one module may have less effect on the inputs of a check than rounding.
    """

    name: str
    meaning: str
    make: Callable[[Adapter], Adapter | None]
    others: Callable[[Adapter], Iterator[Adapter]] = _nothing_else

    def tries(self, adapter: Adapter) -> Iterator[Adapter]:
        """Return the wrong adapters to try, until one is caught."""
        if (first := self.make(adapter)) is not None:
            yield first
            yield from self.others(adapter)


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
    return _with_factors(
        adapter,
        {m: dataclasses.replace(pair, B=pair.B * 2) for m, pair in adapter.factors.items()},
    )


def swapped_factors(adapter: Adapter) -> Adapter | None:
    """Swap the factors of the first two modules of the same shape of which one has an update."""
    first: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    for module, pair in sorted(adapter.factors.items()):
        other = first.setdefault((pair.A.shape, pair.B.shape), module)
        if other != module and (_updates(pair) or _updates(adapter.factors[other])):
            changed = dict(adapter.factors)
            changed[module], changed[other] = changed[other], changed[module]
            return _with_factors(adapter, changed)
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
    pair = adapter.factors[module]
    return _with_factors(
        adapter, {**adapter.factors, module: dataclasses.replace(pair, B=pair.B * 0)}
    )


def _updates(pair: Factors) -> bool:
    return pair.has_effect


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
    """Leave out the trained biases: the base's biases stay."""
    if adapter.config.bias == "none" or not adapter.factors:
        return None
    kept = {n: values for n, values in adapter.saved.items() if is_saved(n, adapter.config)}
    config = dataclasses.replace(adapter.config, bias="none")
    return dataclasses.replace(adapter, config=config, saved=kept)


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


MISTAKES: Final[tuple[Mistake, ...]] = (
    Mistake("wrong adapter", "another adapter of the same shapes", wrong_adapter),
    Mistake("doubled alpha", "the scaling is twice what it should be", doubled_alpha),
    Mistake("swapped factors", "two modules have each other's factors", swapped_factors),
    Mistake("missing target", "one module has no update", missing_target, other_missing_targets),
    Mistake("ignored magnitude", "DoRA's outputs are not scaled", ignored_magnitude),
    Mistake("ignored bias", "the trained biases are left out", ignored_bias),
    Mistake("ignored tokens", "trained rows of tokens are left out", ignored_tokens),
    Mistake("swapped tokens", "trained tokens have each other's rows", swapped_tokens),
    Mistake("swapped labels", "labels have each other's rows of the head", swapped_labels),
)
OFF_BY_ONE: Final = Mistake(
    "off-by-one row", "each row of a mixed batch has its neighbor's adapter", lambda _: None
)


BASE_ENCODER: Final = Mistake(
    "encoder without adapter", "the encoder's outputs are the base's", lambda _: None
)

# The decoders that a mistake with embeddings applies to: all, those in which an image's positions
# attend to each other, those with three-dimensional positions (M-RoPE).
ALWAYS, BLOCKS, MROPE = "always", "blocks", "mrope"
EMBEDS_MISTAKES: Final = (
    (
        Mistake("shifted places", "embeddings are fed one token too late", lambda _: None),
        Fed.shifted,
        ALWAYS,
    ),
    (
        Mistake("exchanged embeddings", "images have each other's embeddings", lambda _: None),
        Fed.exchanged,
        ALWAYS,
    ),
    (
        Mistake(
            "causal images", "an image's positions attend to earlier ones only", lambda _: None
        ),
        Fed.causal,
        BLOCKS,
    ),
    (
        Mistake("positions of text", "an image's tokens are counted one by one", lambda _: None),
        Fed.flat,
        MROPE,
    ),
    (
        Mistake("turned positions", "rows and columns are exchanged", lambda _: None),
        Fed.turned,
        MROPE,
    ),
)


@dataclass(frozen=True)
class Controls:
    """The results of the mistakes, and `notes` on those that could not be judged."""

    made: tuple[Control, ...] = ()
    notes: tuple[str, ...] = ()


def run_controls(context: CheckContext, reference: Reference, base: Base) -> Controls:
    """Apply every mistake to every adapter that has an effect, and judge the outputs."""
    found: list[Control] = []
    notes: list[str] = []

    def add(mistake: Mistake, name: str, rows: Sequence[Row], against: Reference) -> None:
        control = judge_mistake(mistake, name, rows, context, against)
        if control is None:
            notes.append(_left_out(mistake, name))
        else:
            found.append(control)

    before: str | None = None  # the neighbor in a mixed batch, the base at first
    for tested in context.adapters:
        if not reference.effect[tested.name].largest:
            notes.append(f"no control was made with {tested.name}, which has no effect")
            continue
        for mistake in MISTAKES:
            tried = _tried(mistake, tested, context, reference, base)
            found += tried.made
            notes += tried.notes
        if context.manifest.mode != "merged":  # a merged graph has no mixed batches
            add(OFF_BY_ONE, tested.name, reference.rows[before], reference)
            before = tested.name
        encoder = reference.encoder
        if encoder is not None and encoder.effect[tested.name].largest:
            add(BASE_ENCODER, tested.name, encoder.rows[None], encoder)
        found += _embeds_controls(context, reference, base, tested)
    return Controls(tuple(found), tuple(notes))


def _tried(
    mistake: Mistake,
    tested: AdapterUnderTest,
    context: CheckContext,
    reference: Reference,
    base: Base,
) -> Controls:
    """Apply the mistake to the adapter, with other modules until one is caught."""
    missed: list[Control] = []
    notes: list[str] = []
    for wrong in mistake.tries(tested.adapter):
        # Loaded as the reference loads the right one, so that only the mistake differs.
        with as_reference_with(context, base, wrong) as model:
            rows = reference_rows(context, model, tested.name, 0)
        control = judge_mistake(mistake, tested.name, rows, context, reference)
        if control is None:
            return Controls(notes=(_left_out(mistake, tested.name),))
        if control.caught:
            return Controls((control,), tuple(notes))
        missed.append(control)
        pairs = tested.adapter.factors
        changed = [module for module, pair in pairs.items() if wrong.factors[module] is not pair]
        notes.append(
            f"the control {mistake.name!r} of {tested.name} was made with another module, because"
            f" these inputs do not show a mistake with {listed_names(changed, 2)}: its error of"
            f" {control.error:.2g} is within the limits"
        )
    return Controls(tuple(sorted(missed, key=lambda one: -one.error)[:1]))


def _left_out(mistake: Mistake, name: str) -> str:
    return (
        f"the control {mistake.name!r} of {name} was left out: every prompt has tokens that the"
        " base does not have"
    )


def _embeds_controls(
    context: CheckContext, reference: Reference, base: Base, tested: AdapterUnderTest
) -> Iterator[Control]:
    """Apply the mistakes with embeddings that are fed in place of tokens."""
    right = [row for row in reference.rows[tested.name] if row.fed is not None]
    if not right:
        return
    mrope = all(row.fed is not None and row.fed.positions is not None for row in right)
    kinds = {ALWAYS: True, BLOCKS: context.manifest.image_blocks, MROPE: mrope}
    for mistake, make, kind in EMBEDS_MISTAKES:
        if not kinds[kind]:
            continue
        with as_reference_with(context, base, tested.adapter) as model:
            backend = TorchModel(model, context.manifest)
            wrong = [backend.with_embeds(row.prompt, make(row.fed)) for row in right if row.fed]
        rows = [
            [r.reading(f) for r, f in zip(right, fed, strict=True) if f]
            for fed in ([row.fed for row in right], wrong)
        ]
        control = judge_mistake(
            mistake, tested.name, rows[1], context, reference, right=rows[0], phase=EMBEDDED
        )
        if control is not None:
            yield control


def judge_mistake(
    mistake: Mistake,
    name: str,
    rows: Sequence[Row],
    context: CheckContext,
    reference: Reference,
    right: Sequence[Row] | None = None,
    phase: str | None = None,
) -> Control | None:
    """Return whether `rows`, computed with a mistake, fail; None if no positions can be compared.

    `right`: the correct rows, by default the reference's for the adapter `name`; `phase`: theirs.
    """
    scale, effect = reference.scale_in(phase, name), reference.effect[name].largest
    logits = has_logits(context.manifest.task) and not reference.states
    comparison = Comparison(scale=scale, logits=logits)
    for own, wrong in zip(right or reference.rows[name], rows, strict=True):
        if own.prompt != wrong.prompt:
            continue  # the neighbor's adapter does not have the tokens of this prompt
        count = len(own.prompt) if own.forced else len(own.expected)
        width = min(own.expected.shape[-1], wrong.expected.shape[-1])  # heads may differ
        expected, found = own.expected[:count, :width], wrong.expected[:count, :width]
        whole = width == own.expected.shape[-1]
        about = own.about[:count] if whole and own.about is not None else None
        comparison.add(expected, found, case=own.case, about=about)
    figures = comparison.figures()
    if not figures.positions:
        return None
    verdict = judge(figures, reference.limits_in(phase, name), effect=effect)
    error = verdict.figures.max_abs
    return Control(mistake.name, mistake.meaning, name, not verdict.passed, error, effect)


def _with_factors(adapter: Adapter, factors: Mapping[str, Factors]) -> Adapter:
    return dataclasses.replace(adapter, factors=factors)
