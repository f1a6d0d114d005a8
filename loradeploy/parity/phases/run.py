"""Runs a backend through the phases and yields the outputs that it returns.

Decoders:  prefill           each prompt by itself, followed by the tokens that the reference chose
           chunked prefill   the same in two or three chunks, each with the cache of those before
           padded batch      the prompts in batches, padded on the side that the graph requires
           permuted batch    one batch with its rows in another order
           decode            from the batch's cache on, the reference's tokens, one per step
           repeat            a prompt a second time, compared with the first
           embeddings        image-text decoders: batches with embeddings in place of some tokens
Encoder-decoders:
           encoder           a few sources in batches: the encoder's own outputs
           prefill           each source by itself, with a whole target
           padded batch      the sources in batches, padded on the right
           permuted batch    one batch with its rows in another order
           decode            the target, one token per step, with the caches
           repeat
Encoders:  one row           each text by itself
           padded batch      the texts in batches, padded on the right
           permuted batch, repeat

Some phases run only the first few rows (`rows_of`): what they test shows on any row.

Every backend is fed the tokens that the reference chose, so its greedy choice can be compared with
the reference's at every step. Up to the first difference, it is what the backend would generate.

Images, sounds and the targets of encoder-decoders, which the tokens of a row stand for (see
`feeds`), are not padded.

An encoder's output for a whole text (`pooler_output`) counts as one more position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from loradeploy.adapter.tasks import CAUSAL_LM, SEQ2SEQ_LM
from loradeploy.parity.names import (
    CHUNKED,
    DECODE,
    EMBEDDED,
    ENCODER,
    ONE_ROW,
    PADDED_BATCH,
    PERMUTED,
    PREFILL,
    REPEAT,
)
from loradeploy.parity.phases.batches import MAX_ROWS, batches, evenly, of_one_length
from loradeploy.parity.phases.choice import rows_of
from loradeploy.parity.phases.fed import embeds_feeds
from loradeploy.parity.phases.outputs import real_positions
from loradeploy.parity.phases.rows import Observation
from loradeploy.runtime.text.padding import pad as pad_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.parity.phases.models import EmbedsModel, Model, SourceModel
    from loradeploy.parity.phases.rows import Row

    Ids = NDArray[np.int64]

# The outputs that do not belong to an adapter must be at most this, so that their probability is 0.
_HIDDEN: Final = -1e3


@dataclass(frozen=True)
class Feeding:
    """How a backend is fed in a check of a `task`.

    `pad`: the padding id. `left`: whether a decoder's batches are padded on the left. `alike`:
    whether a batch has only rows of equal length, because the graph does not support padding.
    `batched`: whether the backend takes more than one row at a time.
    """

    task: str
    pad: int
    left: bool = True
    alike: bool = False
    batched: bool = True

    def padded(self, batch: Sequence[Row]) -> tuple[Ids, Ids]:
        """Return the prompts of a batch and their mask, both [rows, tokens]."""
        left = self.left and self.task == CAUSAL_LM
        return pad_rows([row.prompt for row in batch], self.pad, left=left)

    def batches(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """Yield `rows` in the batches that the backend takes."""
        for some in batches(rows, most=MAX_ROWS if self.batched else 1):
            yield from of_one_length(some) if self.alike else [some]


def run_phases(
    model: Model, rows: Sequence[Row], phases: Sequence[str], feeding: Feeding
) -> Iterator[Observation]:
    """Run `model` on `rows` in `phases`; phases that the task does not have are left out."""
    for seen in _observations(model, rows, phases, feeding):
        own = seen.row.outputs
        if own is None:
            yield seen
            continue
        before = None if seen.before is None else seen.before[..., :own]
        values = seen.values[..., :own]
        # Otherwise an output that is not the adapter's could be chosen. NaN fails this test too.
        if not (seen.values[..., own:] <= _HIDDEN).all():
            values = np.full_like(values, np.nan)
        yield replace(seen, values=values, before=before)


def _observations(
    model: Model, rows: Sequence[Row], phases: Sequence[str], feeding: Feeding
) -> Iterator[Observation]:
    """Yield the observations of `run_phases`, with all outputs of the graph."""
    task = feeding.task
    if ENCODER in phases and (sources := rows_of(ENCODER, rows)):
        for batch in feeding.batches(sources):
            yield from _run_encoder(cast("SourceModel", model), batch, feeding)
    alone = PREFILL if task in (CAUSAL_LM, SEQ2SEQ_LM) else ONE_ROW
    again = rows_of(REPEAT, rows) if REPEAT in phases else ()
    for row in rows if alone in phases else again:
        values = _forward_alone(model, row, task)
        if alone in phases:
            yield Observation(alone, row, 0, values)
        if row in again:
            before = np.array(values)  # a copy: a backend may return the same buffer each time
            yield Observation(REPEAT, row, 0, _forward_alone(model, row, task), before)
    if CHUNKED in phases and task == CAUSAL_LM:
        for row in rows_of(CHUNKED, rows):
            yield from _run_chunks(model, row)
    if PADDED_BATCH in phases or DECODE in phases:
        shown = rows
        if PADDED_BATCH not in phases:
            shown = rows_of(DECODE, rows, batched=feeding.batched)
        for batch in feeding.batches(shown):
            yield from _run_batch(model, batch, phases, feeding)
    if DECODE in phases and (decoded := [row for row in rows if row.target]):
        for batch in batches(decoded, most=MAX_ROWS if feeding.batched else 1):
            yield from _run_target(cast("SourceModel", model), batch, feeding)
    if EMBEDDED in phases and (fed := rows_of(EMBEDDED, rows)):
        for batch in feeding.batches(fed):
            yield from _run_embedded(cast("EmbedsModel", model), batch, feeding)
    if PERMUTED in phases and (permuted := rows_of(PERMUTED, rows)):
        for some in of_one_length(permuted) if feeding.alike else [permuted]:
            for batch in evenly(some):
                yield from _run_permuted(model, batch, feeding)


def _forward_alone(model: Model, row: Row, task: str) -> NDArray[Any]:
    ids = np.array([row.tokens], np.int64)
    mask = np.ones_like(ids)
    values, _ = model.forward(ids, mask, None, [row.adapter])
    return real_positions(values[0], mask[0].astype(bool), task)


def _run_chunks(model: Model, row: Row) -> Iterator[Observation]:
    tokens = np.array([row.tokens], np.int64)
    chunks = 3 if len(row.tokens) >= 3 * 2 else 2
    cache, seen = None, 0
    for ids in np.array_split(tokens, chunks, axis=1):
        first, seen = seen, seen + ids.shape[1]
        mask = np.ones((1, seen), np.int64)
        values, cache = model.forward(ids, mask, cache, [row.adapter])
        yield Observation(CHUNKED, row, first, values[0])


def _run_batch(
    model: Model, batch: Sequence[Row], phases: Sequence[str], feeding: Feeding
) -> Iterator[Observation]:
    adapters = [row.adapter for row in batch]
    ids, mask = feeding.padded(batch)
    values, cache = model.forward(ids, mask, None, adapters)
    if PADDED_BATCH in phases:
        yield from _observe_batch(PADDED_BATCH, batch, mask, values, feeding.task)
    if DECODE not in phases:
        return
    for step in range(len(batch[0].forced) - 1):
        ids = np.array([[row.forced[step]] for row in batch], np.int64)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        values, cache = model.forward(ids, mask, cache, adapters)
        for row, its in zip(batch, values, strict=True):
            yield Observation(DECODE, row, len(row.prompt) + step, its)


def _run_embedded(
    model: EmbedsModel, batch: Sequence[Row], feeding: Feeding
) -> Iterator[Observation]:
    ids, mask = feeding.padded(batch)
    fed = [row.fed for row in batch if row.fed is not None]
    adapters = [row.adapter for row in batch]
    values, _ = model.forward(ids, mask, None, adapters, embeds=embeds_feeds(fed, mask))
    for row, own, real, its in zip(batch, fed, mask.astype(bool), values, strict=True):
        yield Observation(EMBEDDED, row, 0, its[real], own.expected)


def _run_encoder(
    model: SourceModel, batch: Sequence[Row], feeding: Feeding
) -> Iterator[Observation]:
    ids, mask = feeding.padded(batch)
    values = model.encode(ids, mask, [row.adapter for row in batch])
    for row, real, its in zip(batch, mask.astype(bool), values, strict=True):
        assert row.encoded is not None
        own = its if len(its) == len(row.encoded) else its[real]  # a sound has no padding
        yield Observation(ENCODER, row, 0, own, row.encoded)


def _run_target(
    model: SourceModel, batch: Sequence[Row], feeding: Feeding
) -> Iterator[Observation]:
    ids, mask = feeding.padded(batch)
    values = model.decode(ids, mask, [row.adapter for row in batch])
    for row, its in zip(batch, values, strict=True):
        yield Observation(DECODE, row, 0, its)


def _run_permuted(model: Model, batch: Sequence[Row], feeding: Feeding) -> Iterator[Observation]:
    batch = [*batch[1:], batch[0]]  # no row stays in its place
    ids, mask = feeding.padded(batch)
    values, _ = model.forward(ids, mask, None, [row.adapter for row in batch])
    yield from _observe_batch(PERMUTED, batch, mask, values, feeding.task)


def _observe_batch(
    phase: str, batch: Sequence[Row], mask: Ids, values: NDArray[Any], task: str
) -> Iterator[Observation]:
    for row, real, its in zip(batch, mask.astype(bool), values, strict=True):
        yield Observation(phase, row, 0, real_positions(its, real, task))


def generate(
    model: Model, prompts: Sequence[Sequence[int]], *, count: int, pad: int, adapter: str | None
) -> list[tuple[int, ...]]:
    """Generate `count` tokens greedily after each prompt; all prompts are one batch."""
    ids, mask = pad_rows(prompts, pad, left=True)
    adapters = [adapter] * len(prompts)
    if not count:
        return [()] * len(prompts)
    chosen, cache = [], None
    for _ in range(count):
        values, cache = model.forward(ids, mask, cache, adapters)
        ids = values[:, -1].argmax(axis=-1)[:, None].astype(np.int64)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        chosen.append(ids[:, 0])
    return [tuple(row) for row in np.stack(chosen, axis=1).tolist()]
