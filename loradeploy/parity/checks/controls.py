"""Negative controls: deliberate mistakes that the check must catch.

Each mistake is applied to an adapter in PyTorch, and its outputs are compared with the reference
as if they were those of a backend. If a mistake passes, the same mistake in a deployment would not
be noticed with these prompts and tolerances either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loradeploy.errors import listed_names
from loradeploy.parity.checks.mistakes import (
    ALWAYS,
    BASE_ENCODER,
    BLOCKS,
    EMBEDS_MISTAKES,
    MISTAKES,
    MROPE,
    OFF_BY_ONE,
    AdapterMistake,
    Mistake,
)
from loradeploy.parity.context import AdapterUnderTest, CheckContext
from loradeploy.parity.figures.metrics import Comparison
from loradeploy.parity.names import EMBEDDED
from loradeploy.parity.phases.outputs import has_logits
from loradeploy.parity.reference.model import TorchModel
from loradeploy.parity.reference.pytorch import as_reference_with, reference_rows
from loradeploy.parity.report.results import Control
from loradeploy.parity.verdict import judge

if TYPE_CHECKING:
    from loradeploy.parity.phases.rows import Row
    from loradeploy.parity.reference.loading import Base
    from loradeploy.parity.reference.pytorch import Reference


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
    mistake: AdapterMistake,
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
    fed = [(row, row.fed) for row in reference.rows[tested.name] if row.fed is not None]
    if not fed:
        return
    mrope = all(its.positions is not None for _, its in fed)
    applies = {ALWAYS: True, BLOCKS: context.manifest.image_blocks, MROPE: mrope}
    right = [row.reading(its) for row, its in fed]
    for mistake in EMBEDS_MISTAKES:
        if not applies[mistake.decoders]:
            continue
        with as_reference_with(context, base, tested.adapter) as model:
            fed_wrong = TorchModel(model, context.manifest).with_embeds
            wrong = [r.reading(fed_wrong(r.prompt, mistake.make(its))) for r, its in fed]
        control = judge_mistake(
            mistake, tested.name, wrong, context, reference, right=right, phase=EMBEDDED
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
