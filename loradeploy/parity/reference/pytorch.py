"""The reference: the base model in PyTorch, with each adapter in turn.

The base model is loaded once (loading.py); adapters are inserted and removed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.fitting.added_tokens import with_all_tokens
from loradeploy.errors import first_line
from loradeploy.parity.context import CheckContext
from loradeploy.parity.figures.expected import Expected
from loradeploy.parity.figures.tolerances import Limit, assumed, calibrated
from loradeploy.parity.inputs.row_feeds import TARGET
from loradeploy.parity.names import EMBEDDED, ENCODER
from loradeploy.parity.phases.batches import batch_size
from loradeploy.parity.phases.fed import FED_ROWS
from loradeploy.parity.phases.outputs import has_logits
from loradeploy.parity.phases.rows import Row
from loradeploy.parity.phases.run import generate
from loradeploy.parity.reference.calibrate import measure_gap
from loradeploy.parity.reference.loading import Base, merged
from loradeploy.parity.reference.model import EncoderOf, TorchModel
from loradeploy.parity.reference.quantized import (
    activations_of,
    rounded_as,
)
from loradeploy.parity.reference.tied import with_rows_of_tied

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter


# Number of rows whose encoder outputs are kept; few, since those of sounds are large.
_ENCODED_ROWS: Final = 3


@dataclass(frozen=True, eq=False)
class Effect:
    """The effect of an adapter in the reference: |adapter − base| over the prompts' outputs."""

    largest: float
    mean: float


@dataclass(frozen=True, eq=False)
class Reference:
    """The outputs of PyTorch, by adapter name; None is the base.

    `scale`: the largest absolute value. `limits`: the tolerances of a deployment.
    `embedded_scale`, `embedded_limits`: the same for rows that are fed embeddings, which have other
    rounding errors. The rows' values are in memory-mapped files. `notes`: for the report.
    `encoder`: the reference of an encoder-decoder's encoder, whose rows are sources. `states`:
    whether this is such a reference, whose values are not logits.
    """

    rows: dict[str | None, tuple[Row, ...]]
    scale: dict[str | None, float]
    effect: dict[str, Effect]
    limits: dict[str | None, Mapping[str, Limit]]
    embedded_scale: Mapping[str | None, float] = field(default_factory=dict)
    embedded_limits: Mapping[str | None, Mapping[str, Limit]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    encoder: Reference | None = None
    states: bool = False

    def of(self, phase: str) -> Reference:
        """Return the reference that the values of `phase` are compared with."""
        return self.encoder if phase == ENCODER and self.encoder is not None else self

    def scale_in(self, phase: str | None, adapter: str | None) -> float:
        """Return the largest absolute value of an adapter in a phase."""
        return (self.embedded_scale if phase == EMBEDDED else self.scale)[adapter]

    def limits_in(self, phase: str | None, adapter: str | None) -> Mapping[str, Limit]:
        """Return the tolerances for an adapter in a phase."""
        return (self.embedded_limits if phase == EMBEDDED else self.limits)[adapter]


def make_reference(context: CheckContext, base: Base) -> Reference:
    """Run the base and every adapter over the cases with PyTorch and loradeploy's LoRA.

    Raises:
        AdapterMismatchError: an adapter does not fit the model.
    """
    notes = list(base.notes)
    rows: dict[str | None, tuple[Row, ...]] = {}
    scale: dict[str | None, float] = {}
    limits: dict[str | None, Mapping[str, Limit]] = {}
    embedded_scale: dict[str | None, float] = {}
    embedded_limits: dict[str | None, Mapping[str, Limit]] = {}
    sources: dict[str | None, tuple[Row, ...]] = {}
    source_scale: dict[str | None, float] = {}
    source_limits: dict[str | None, Mapping[str, Limit]] = {}

    def run(name: str | None, generated: int) -> None:
        rows[name] = own = reference_rows(context, base.model, name, generated)
        scale[name] = _scale(own)
        limits[name] = _limits(context, base, name, own, scale[name], notes)
        if fed := [row.reading(row.fed) for row in own if row.fed is not None]:
            size = embedded_scale[name] = _scale(fed)
            embedded_limits[name] = _limits(context, base, name, fed, size, notes, embeds=True)
        if encoded := tuple(_source(row) for row in own if row.encoded is not None):
            sources[name], size = encoded, _scale(encoded)
            source_scale[name] = size
            limits_of = _limits(context, base, name, encoded, size, notes, states=True)
            source_limits[name] = limits_of

    # Of a merged bundle only the adapter is compared; the base is run to measure the effect.
    with as_reference(context, base, None):
        run(None, 0 if context.merged else context.cases.generated)
    for tested in context.adapters:
        with as_reference(context, base, tested.name):
            run(tested.name, context.cases.generated)

    def effects(each: Mapping[str | None, Sequence[Row]]) -> dict[str, Effect]:
        return {
            # Rows of other lengths are rounded differently, which is not an effect.
            tested.name: Effect(0.0, 0.0)
            if tested.adapter.is_untrained
            else effect(each[None], each[tested.name])
            for tested in context.adapters
        }

    encoder = None
    if sources:
        encoder = Reference(sources, source_scale, effects(sources), source_limits, states=True)
    return Reference(
        rows=rows,
        scale=scale,
        effect=effects(rows),
        limits=limits,
        encoder=encoder,
        embedded_scale=embedded_scale,
        embedded_limits=embedded_limits,
        notes=tuple(dict.fromkeys(notes)),
    )


def _source(row: Row) -> Row:
    """Return the source of `row` as a row of the encoder."""
    assert row.encoded is not None
    return replace(row, forced=(), target=0, expected=row.encoded, about=None)


def as_reference(
    context: CheckContext, base: Base, name: str | None
) -> AbstractContextManager[torch.nn.Module]:
    """Insert the adapter `name` (None: the base) into the reference while the block lasts."""
    adapters = {tested.name: tested.adapter for tested in context.adapters}
    return as_reference_with(context, base, None if name is None else adapters[name])


@contextmanager
def as_reference_with(
    context: CheckContext, base: Base, adapter: Adapter | None
) -> Iterator[torch.nn.Module]:
    """Like `as_reference`, with any adapter that fits the model."""
    from loradeploy.lora.inject import adapted

    with ExitStack() as stack:
        if adapter is not None:
            adapter = with_all_tokens(adapter, context.manifest)
            adapter = stack.enter_context(with_rows_of_tied(base.model, adapter, context.manifest))
            holding = merged if context.merged and base.quantized else adapted
            stack.enter_context(holding(base.model, adapter))
        if context.merged:
            stack.enter_context(rounded_as(base.model, base.quantized))
        yield base.model


def _limits(
    context: CheckContext,
    base: Base,
    name: str | None,
    rows: Sequence[Row],
    scale: float,
    notes: list[str],
    *,
    embeds: bool = False,
    states: bool = False,
) -> Mapping[str, Limit]:
    """Return the tolerances of a deployment of the model, with its current adapter, on `rows`.

    `embeds`: whether the rows are fed embeddings. `states`: whether they are an encoder's.
    """
    manifest = context.manifest
    model = TorchModel(base.model, manifest, context.cases.known, tokens=context.tokens)
    try:
        gap = measure_gap(
            base.model,
            EncoderOf(model) if states else model,
            rows,
            manifest.precision,
            activations_of(base.quantized),
            scale=scale,
            logits=has_logits(manifest.task) and not states,
            embeds=embeds,
        )
    except (RuntimeError, TypeError, ValueError) as problem:  # a model that mixes its own dtypes
        who = manifest.base.name if name is None else f"{manifest.base.name} with {name}"
        notes.append(
            f"the limits are assumed, not measured: {who} cannot run in another dtype"
            f" ({first_line(problem)})"
        )
        return assumed(manifest.precision, scale=scale)
    return calibrated(manifest.precision, gap, scale=scale)


def effect(base: Sequence[Row], adapted: Sequence[Row]) -> Effect:
    """Measure how far the outputs `adapted` are from `base` over the prompts."""
    largest, total, values = 0.0, 0.0, 0
    for one, other in zip(base, adapted, strict=True):
        if one.prompt != other.prompt:
            continue  # the adapter's prompt has tokens that the base does not have
        count = min(len(one.expected), len(other.expected))
        if one.forced or other.forced:
            count = len(one.prompt)
        width = min(one.expected.shape[-1], other.expected.shape[-1])
        sides = (rows.expected[:count, :width] for rows in (one, other))
        for before, after in zip(*sides, strict=True):
            with np.errstate(invalid="ignore", over="ignore"):
                changed = np.abs(after - before)
            if not np.isfinite(before).all() or not np.isfinite(after).all():
                continue  # positions that are not finite fail anyway
            largest = max(largest, float(changed.max()))
            total += float(changed.sum())
            values += changed.size
    return Effect(largest, total / max(1, values))


def reference_rows(
    context: CheckContext, model: torch.nn.Module, adapter: str | None, count: int
) -> tuple[Row, ...]:
    """Run `model`, which has `adapter` in it, and return its rows with `count` generated tokens."""
    cases = context.cases.of(context.tokens.get(adapter))
    backend = TorchModel.of(context, model)
    chooser = TorchModel(model, context.manifest, tokens=context.tokens, last=True)
    forced: list[tuple[int, ...]] = []
    vocabulary = int(getattr(model.config, "vocab_size", 1 << 17))
    for prompts, after in cases.groups:
        size = batch_size(max(map(len, prompts), default=1), vocabulary)
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            steps = min(count, after)
            forced += generate(chooser, batch, count=steps, pad=cases.pad, adapter=adapter)
    rows = []
    target = TARGET if context.manifest.encoder is not None else 0
    sources = max(_ENCODED_ROWS, len(context.adapters) + 1) if target else 0  # one of each adapter
    for number, (prompt, follow) in enumerate(zip(cases.prompts, forced, strict=True)):
        ids = np.array([prompt + follow[:-1]], np.int64)
        values, _ = backend.forward(ids, np.ones_like(ids), None, [adapter])
        if values.ndim == 3:
            values = values[0]  # [positions, width]
        own = context.outputs_of(adapter)
        kept = _keep(context.scratch, values[..., :own])
        edge = number >= len(cases.prompts) - cases.edges
        about = Expected.of(kept, logits=has_logits(context.manifest.task))
        fed = None
        if context.manifest.embeds and number < FED_ROWS and not edge:
            fed = backend.with_embeds(prompt)
        encoded = None
        if number < sources and not edge:
            ids = np.array([prompt], np.int64)
            encoded = _keep(context.scratch, backend.encode(ids, np.ones_like(ids), [adapter])[0])
        rows.append(
            Row(number, adapter, prompt, follow, kept, edge, own, target, about, fed, encoded)
        )
    return tuple(rows)


def _keep(scratch: Path, values: NDArray[Any]) -> NDArray[np.float32]:
    """Return the values as a memory-mapped file, since logits over a vocabulary are large."""
    file = scratch / f"reference-{len(list(scratch.glob('reference-*')))}.npy"
    np.save(file, values.astype(np.float32, copy=False))
    mapped: NDArray[np.float32] = np.load(file, mmap_mode="r")
    return mapped


def _scale(rows: Sequence[Row]) -> float:
    """Return the largest finite absolute value."""
    return max(_largest(row.expected) for row in rows)


def _largest(values: NDArray[np.float32]) -> float:
    largest = max(float(values.max()), -float(values.min()))
    if np.isfinite(largest):
        return largest
    return float(np.nan_to_num(np.abs(values), posinf=0.0).max())
