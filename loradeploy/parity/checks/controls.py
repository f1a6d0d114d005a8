"""Negative controls: mistakes made on purpose, which the check must see.

Each mistake is made to an adapter in PyTorch, and the result is compared with the reference as if a
backend had given it. A mistake that passes means that these prompts and tolerances would not
have noticed it in a deployment either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.config import TOKENS
from loradeploy.adapter.modules.targets import is_saved
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


@dataclass(frozen=True)
class Mistake:
    """A mistake. `make` gives the wrong adapter, or None where it cannot be made with this one."""

    name: str
    meaning: str
    make: Callable[[Adapter], Adapter | None]


def wrong_adapter(adapter: Adapter) -> Adapter | None:
    """Another adapter of the same shapes: each factor's own values, in another order."""
    if not adapter.factors and not adapter.rows:
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
    """s twice as large, which is B twice as large."""
    if not adapter.factors:
        return None
    return _with_factors(
        adapter,
        {m: dataclasses.replace(pair, B=pair.B * 2) for m, pair in adapter.factors.items()},
    )


def swapped_factors(adapter: Adapter) -> Adapter | None:
    """The factors of the first two modules of one shape, unless neither has an update, swapped."""
    first: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    for module, pair in sorted(adapter.factors.items()):
        other = first.setdefault((pair.A.shape, pair.B.shape), module)
        if other != module and (_updates(pair) or _updates(adapter.factors[other])):
            changed = dict(adapter.factors)
            changed[module], changed[other] = changed[other], changed[module]
            return _with_factors(adapter, changed)
    return None


def missing_target(adapter: Adapter) -> Adapter | None:
    """The last module that has an update has none."""
    updated = [module for module in adapter.modules if adapter.factors[module].B.any()]
    if len(adapter.factors) < 2 or not updated:
        return None
    last = updated[-1]
    pair = adapter.factors[last]
    return _with_factors(
        adapter, {**adapter.factors, last: dataclasses.replace(pair, B=pair.B * 0)}
    )


def _updates(pair: Factors) -> bool:
    return pair.magnitude is not None or bool(pair.B.any())


def ignored_magnitude(adapter: Adapter) -> Adapter | None:
    """DoRA's factors as if they were plain ones."""
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
    """The base's own biases in place of the trained ones."""
    if adapter.config.bias == "none" or not adapter.factors:
        return None
    kept = {n: values for n, values in adapter.saved.items() if is_saved(n, adapter.config)}
    config = dataclasses.replace(adapter.config, bias="none")
    return dataclasses.replace(adapter, config=config, saved=kept)


def ignored_tokens(adapter: Adapter) -> Adapter | None:
    """The base's own rows of a vocabulary in place of the trained ones."""
    if not adapter.rows or not (adapter.factors or adapter.saved or adapter.carried):
        return None
    extra = {n: value for n, value in adapter.config.extra.items() if n != TOKENS}
    config = dataclasses.replace(adapter.config, extra=extra)
    return dataclasses.replace(adapter, config=config, rows={})


def swapped_tokens(adapter: Adapter) -> Adapter | None:
    """Each trained token has the row of the next."""
    if all(len(rows.indices) < 2 for rows in adapter.rows.values()):
        return None
    rows = {
        parameter: dataclasses.replace(its, values=np.roll(its.values, 1, axis=0))
        for parameter, its in adapter.rows.items()
    }
    return dataclasses.replace(adapter, rows=rows)


MISTAKES: Final[tuple[Mistake, ...]] = (
    Mistake("wrong adapter", "another adapter of the same shapes", wrong_adapter),
    Mistake("doubled alpha", "the scaling is twice what it should be", doubled_alpha),
    Mistake("swapped factors", "two modules have each other's factors", swapped_factors),
    Mistake("missing target", "one module has no update", missing_target),
    Mistake("ignored magnitude", "DoRA's outputs are not scaled", ignored_magnitude),
    Mistake("ignored bias", "the trained biases are left out", ignored_bias),
    Mistake("ignored tokens", "trained rows of tokens are left out", ignored_tokens),
    Mistake("swapped tokens", "trained tokens have each other's rows", swapped_tokens),
)
OFF_BY_ONE: Final = Mistake(
    "off-by-one row", "each row of a mixed batch has its neighbor's adapter", lambda _: None
)


BASE_ENCODER: Final = Mistake(
    "encoder without adapter", "the encoder gives what the base's gives", lambda _: None
)

# Which decoders a mistake with embeddings is of: all, those in which an image's positions attend to
# each other, those that count positions in three dimensions.
ALWAYS, BLOCKS, MROPE = "always", "blocks", "mrope"
EMBEDS_MISTAKES: Final = (
    (
        Mistake("shifted places", "embeddings are read one token too late", lambda _: None),
        Fed.shifted,
        ALWAYS,
    ),
    (
        Mistake("exchanged embeddings", "images have each other's places", lambda _: None),
        Fed.exchanged,
        ALWAYS,
    ),
    (
        Mistake("causal images", "an image's positions see those before alone", lambda _: None),
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
    """The mistakes that were made, and `notes` on those that could not be judged."""

    made: tuple[Control, ...] = ()
    notes: tuple[str, ...] = ()


def run_controls(context: CheckContext, reference: Reference, base: Base) -> Controls:
    """Make every mistake with every adapter that has an effect, and judge it."""
    found: list[Control] = []
    notes: list[str] = []

    def add(mistake: Mistake, name: str, rows: Sequence[Row], against: Reference) -> None:
        control = judge_mistake(mistake, name, rows, context, against)
        if control is None:
            notes.append(
                f"the control {mistake.name!r} of {name} was left out: every prompt has tokens that"
                " the base does not have"
            )
        else:
            found.append(control)

    before: str | None = None  # the neighbor in a mixed batch, the base at first
    for tested in context.adapters:
        if not reference.effect[tested.name].largest:
            continue
        for mistake in MISTAKES:
            wrong = mistake.make(tested.adapter)
            if wrong is not None:
                # As the reference holds the right one, so that nothing but the mistake is between.
                with as_reference_with(context, base, wrong) as model:
                    rows = reference_rows(context, model, tested.name, 0)
                add(mistake, tested.name, rows, reference)
        if context.manifest.mode != "merged":  # a merged graph has no mixed batches
            add(OFF_BY_ONE, tested.name, reference.rows[before], reference)
            before = tested.name
        encoder = reference.encoder
        if encoder is not None and encoder.effect[tested.name].largest:
            add(BASE_ENCODER, tested.name, encoder.rows[None], encoder)
        found += _embeds_controls(context, reference, base, tested)
    return Controls(tuple(found), tuple(notes))


def _embeds_controls(
    context: CheckContext, reference: Reference, base: Base, tested: AdapterUnderTest
) -> Iterator[Control]:
    """Mistakes with the embeddings that are read instead of tokens."""
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
    """Whether `rows`, with a mistake in them, fail; None where there is nothing to compare.

    `right`: the rows that they are compared with, and the phase that these are of.
    """
    scale, effect = reference.scale_in(phase, name), reference.effect[name].largest
    logits = has_logits(context.manifest.task) and not reference.states
    comparison = Comparison(scale=scale, logits=logits)
    for own, wrong in zip(right or reference.rows[name], rows, strict=True):
        if own.prompt != wrong.prompt:
            continue  # a neighbor without its tokens
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
