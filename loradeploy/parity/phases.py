"""The way every backend takes through the inputs, and what it shows on it.

Decoders:  prefill           each prompt by itself, followed by the tokens that the reference chose
           chunked prefill   the same in two or three pieces, each on the cache of those before
           padded batch      the prompts in batches, padded on the side that the graph wants
           permuted batch    one batch with its rows in another order
           decode            from the batch's cache on, the reference's tokens one a step
           repeat            a prompt a second time, compared with the first
           embeddings        of images and text: batches with embeddings in some tokens' places
Encoder-decoders:
           prefill           each source by itself, with a whole target
           padded batch      the sources in batches, padded on the right
           permuted batch    one batch with its rows in another order
           decode            the target one token a step, on the caches
           repeat
Encoders:  one row           each text by itself
           padded batch      the texts in batches, padded on the right
           permuted batch, repeat

Some phases are shown of the first few rows alone (`rows_of`): their defects show on any row.

Since every backend is fed the tokens that the reference chose, its own greedy choice can be held
against the reference's at every step; up to the first difference it is what it would generate.

Of an image, a sound and an encoder-decoder's target, which the tokens of a row stand for (see
`feeds`), nothing is padded: a batch of them is just a batch.

What an encoder gives for a text as a whole (`pooler_output`) counts as one more position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import numpy as np

from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    FEATURES,
    IMAGES,
    SEQ2SEQ_LM,
    VISION_TOWER,
)
from loradeploy.bundle.names import PRESENT
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import UsageError
from loradeploy.parity.fed import FED_ROWS, Fed, embeds_feeds
from loradeploy.parity.names import (
    CHUNKED,
    DECODE,
    DECODER_PHASES,
    EMBEDDED,
    ENCODER_PHASES,
    ONE_ROW,
    PADDED_BATCH,
    PERMUTED,
    PREFILL,
    REPEAT,
    SEQ2SEQ_PHASES,
)
from loradeploy.runtime.tokenizer import pad as pad_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest
    from loradeploy.parity.expected import Expected

    Ids = NDArray[np.int64]

# How many rows a phase is shown of, where it is not all.
_FEW: Final = {CHUNKED: 4, PERMUTED: 4, REPEAT: 2}
# The same for decoding row by row, which takes long.
_DECODED_ALONE: Final = 4
# With fewer tokens no chunk after the first has two, and a mask that is wrong there shows nothing.
_TO_CHUNK: Final = 4

_PHASES: Final = {CAUSAL_LM: DECODER_PHASES, SEQ2SEQ_LM: SEQ2SEQ_PHASES}

# Rows of one batch, and the size of one output that a batch may have.
_MAX_ROWS: Final = 16
_MAX_OUTPUT: Final = 1 << 26  # values


class Model(Protocol):
    """A backend, opened."""

    def forward(
        self, ids: Ids, mask: Ids, cache: Any, adapters: Sequence[str | None]
    ) -> tuple[NDArray[Any], Any]:
        """`ids` [rows, new tokens] and `mask` [rows, all tokens] → values and the next cache.

        The values are [rows, new tokens, width], with one more position where there is an output
        for the whole row, or [rows, labels] of a classifier. `cache` is None at first, then what
        the call before returned. `adapters` names each row's adapter.
        """


class EmbedsModel(Protocol):
    """A backend of a decoder that takes embeddings."""

    def forward(
        self,
        ids: Ids,
        mask: Ids,
        cache: Any,
        adapters: Sequence[str | None],
        *,
        embeds: Mapping[str, NDArray[Any]] | None = None,
    ) -> tuple[NDArray[Any], Any]:
        """See `Model.forward`; `embeds`: `inputs_embeds` and `inputs_embeds_mask`."""


class SourceModel(Model, Protocol):
    """A backend of an encoder-decoder with a cache."""

    def decode(self, ids: Ids, mask: Ids, adapters: Sequence[str | None]) -> NDArray[Any]:
        """For sources `ids`, the target's tokens one a step → [rows, target, width]."""


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt with one adapter, and what the reference gives for it.

    `forced`: the tokens that the reference generated. `expected`: [positions, width]; positions
    are those of the prompt and of the forced tokens but the last, or one of a classifier.
    `edge`: it is of an extreme length, and shares batches with its like alone.
    `outputs`: how many of the graph's outputs are its adapter's, the first ones; None of all. The
    others are constants so large that they would hide what the adapter does.
    `target`: how many tokens of an encoder-decoder's target are decoded one by one on its cache.
    `about`: what is known of `expected`, which every backend is compared with.
    `fed`: embeddings in the places of some tokens of the prompt, of a decoder that takes them.
    """

    case: int
    adapter: str | None
    prompt: tuple[int, ...]
    forced: tuple[int, ...]
    expected: NDArray[np.float32]
    edge: bool = False
    outputs: int | None = None
    target: int = 0
    about: Expected | None = None
    fed: Fed | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """All that is fed, in one row."""
        return self.prompt + self.forced[:-1]

    @property
    def first_step(self) -> int | None:
        """The position that chooses the first generated token."""
        return len(self.prompt) - 1 if self.forced else None

    def due(self, phase: str) -> int:
        """How many positions the phase shows of this row."""
        if phase == EMBEDDED:
            return 0 if self.fed is None else len(self.prompt)
        if phase == DECODE and self.target:
            return self.target
        if phase == DECODE:
            return max(0, len(self.forced) - 1)
        batched = phase in (PADDED_BATCH, PERMUTED) and self.forced
        return len(self.prompt) if batched else len(self.expected)


@dataclass(frozen=True, eq=False)
class Observation:
    """Consecutive positions of a row as a backend sees them: `values` [positions, width].

    `before`: what the backend gave the first time, where it is that and not the reference that the
    values are compared with.
    """

    phase: str
    row: Row
    first: int
    values: NDArray[Any]
    before: NDArray[Any] | None = None

    @property
    def expected(self) -> NDArray[Any]:
        """What the values should be, of the same shape."""
        if self.before is not None:
            return self.before
        return self.row.expected[self.first : self.first + len(self.values)]

    @property
    def about(self) -> Expected | None:
        """What is known of the expected values."""
        known = None if self.before is not None else self.row.about
        return None if known is None else known[self.first : self.first + len(self.values)]


def run_phases(
    model: Model,
    rows: Sequence[Row],
    *,
    task: str,
    pad: int,
    phases: Sequence[str],
    left: bool = True,
    alike: bool = False,
    batched: bool = True,
) -> Iterator[Observation]:
    """Take `model` through `rows`; phases that the task does not have are left out.

    `left`: whether a decoder's batches are padded there. `alike`: whether rows of one length alone
    share a batch, because the graph takes no padding. `batched`: whether the model takes more
    than one row; one that does not decodes row by row.
    """
    for seen in _observations(
        model, rows, task=task, pad=pad, phases=phases, left=left, alike=alike, batched=batched
    ):
        own = seen.row.outputs
        if own is None:
            yield seen
            continue
        before = None if seen.before is None else seen.before[..., :own]
        yield replace(seen, values=seen.values[..., :own], before=before)


def _observations(
    model: Model,
    rows: Sequence[Row],
    *,
    task: str,
    pad: int,
    phases: Sequence[str],
    left: bool,
    alike: bool,
    batched: bool,
) -> Iterator[Observation]:
    """What `run_phases` gives, with all outputs of the graph."""
    alone = PREFILL if task in (CAUSAL_LM, SEQ2SEQ_LM) else ONE_ROW
    again = rows_of(REPEAT, rows) if REPEAT in phases else ()
    for row in rows if alone in phases else again:
        values = _forward_alone(model, row, task)
        if alone in phases:
            yield Observation(alone, row, 0, values)
        if row in again:
            before = np.array(values)  # a copy: a backend may give its own buffer each time
            yield Observation(REPEAT, row, 0, _forward_alone(model, row, task), before)
    if CHUNKED in phases and task == CAUSAL_LM:
        for row in rows_of(CHUNKED, rows):
            yield from _run_chunks(model, row)
    side = left and task == CAUSAL_LM
    if PADDED_BATCH in phases or DECODE in phases:
        shown = rows if PADDED_BATCH in phases else rows_of(DECODE, rows, batched=batched)
        for some in _batches(shown, most=_MAX_ROWS if batched else 1):
            for batch in _of_one_length(some) if alike else [some]:
                yield from _run_batch(model, batch, task=task, pad=pad, phases=phases, left=side)
    if DECODE in phases and (decoded := [row for row in rows if row.target]):
        for some in _batches(decoded, most=_MAX_ROWS if batched else 1):
            yield from _run_target(cast("SourceModel", model), some, pad=pad)
    if EMBEDDED in phases and (fed := rows_of(EMBEDDED, rows)):
        for some in _batches(fed, most=_MAX_ROWS if batched else 1):
            for batch in _of_one_length(some) if alike else [some]:
                yield from _run_embedded(cast("EmbedsModel", model), batch, pad=pad, left=side)
    if PERMUTED in phases and (permuted := rows_of(PERMUTED, rows)):
        for batch in _of_one_length(permuted) if alike else [permuted]:
            yield from _run_permuted(model, batch, task=task, pad=pad, left=side)


def phases_of(task: str, *, embeds: bool = False) -> tuple[str, ...]:
    """The phases that a task has; `embeds`: of a decoder that takes embeddings."""
    known = _PHASES.get(task, ENCODER_PHASES)
    return (*known, EMBEDDED) if embeds else known


def choose_phases(
    task: str, asked: Sequence[str] | None, *, embeds: bool = False
) -> tuple[str, ...]:
    """The phases of a task, or those asked for; their words may be joined by dashes.

    Raises:
        UsageError: a name that is no phase, or none of this task.
    """
    known = phases_of(task, embeds=embeds)
    if asked is None:
        return known
    named = [name.replace("-", " ") for name in asked]
    for name in named:
        if name not in known:
            raise UsageError(f"{task} has no phase {name!r}: there are {', '.join(known)}")
    if not named:
        raise UsageError("no phases are given: nothing would be compared")
    return tuple(phase for phase in known if phase in named)


def rows_of(phase: str, rows: Sequence[Row], *, batched: bool = True) -> Sequence[Row]:
    """Those of `rows` that a phase is shown of; see `run_phases`."""
    if phase == DECODE and not batched:
        return rows[:_DECODED_ALONE]
    if phase == EMBEDDED:
        return [row for row in rows if row.fed is not None][:FED_ROWS]
    if phase not in _FEW:
        return rows
    few = [row for row in rows if not row.edge]
    if phase == CHUNKED:
        few = [row for row in few if len(row.tokens) >= _TO_CHUNK]
    few = few[: _FEW[phase]]
    return () if phase == PERMUTED and len(few) < 2 else few


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` of `rows`, of all lengths: the longest, whose errors add up the most, among them."""
    ordered = sorted(rows, key=lambda row: len(row.tokens))
    picks = np.unique(np.linspace(0, len(ordered) - 1, count).astype(int))
    return [ordered[pick] for pick in picks]


def _of_one_length(rows: Sequence[Row]) -> list[list[Row]]:
    """`rows` by the length of their prompts."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(len(row.prompt), []).append(row)
    return list(groups.values())


def _forward_alone(model: Model, row: Row, task: str) -> NDArray[Any]:
    ids = np.array([row.tokens], np.int64)
    mask = np.ones_like(ids)
    values, _ = model.forward(ids, mask, None, [row.adapter])
    return _positions(values[0], mask[0].astype(bool), task)


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
    model: Model,
    batch: Sequence[Row],
    *,
    task: str,
    pad: int,
    phases: Sequence[str],
    left: bool,
) -> Iterator[Observation]:
    adapters = [row.adapter for row in batch]
    ids, mask = pad_rows([row.prompt for row in batch], pad, left=left)
    values, cache = model.forward(ids, mask, None, adapters)
    if PADDED_BATCH in phases:
        yield from _observe_batch(PADDED_BATCH, batch, mask, values, task)
    if DECODE not in phases:
        return
    for step in range(len(batch[0].forced) - 1):
        ids = np.array([[row.forced[step]] for row in batch], np.int64)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        values, cache = model.forward(ids, mask, cache, adapters)
        for row, its in zip(batch, values, strict=True):
            yield Observation(DECODE, row, len(row.prompt) + step, its)


def _run_embedded(
    model: EmbedsModel, batch: Sequence[Row], *, pad: int, left: bool
) -> Iterator[Observation]:
    ids, mask = pad_rows([row.prompt for row in batch], pad, left=left)
    fed = [row.fed for row in batch if row.fed is not None]
    adapters = [row.adapter for row in batch]
    values, _ = model.forward(ids, mask, None, adapters, embeds=embeds_feeds(fed, mask))
    for row, own, real, its in zip(batch, fed, mask.astype(bool), values, strict=True):
        yield Observation(EMBEDDED, row, 0, its[real], own.expected)


def _run_target(model: SourceModel, batch: Sequence[Row], *, pad: int) -> Iterator[Observation]:
    ids, mask = pad_rows([row.prompt for row in batch], pad, left=False)
    values = model.decode(ids, mask, [row.adapter for row in batch])
    for row, its in zip(batch, values, strict=True):
        yield Observation(DECODE, row, 0, its)


def _run_permuted(
    model: Model, batch: Sequence[Row], *, task: str, pad: int, left: bool
) -> Iterator[Observation]:
    batch = [*batch[1:], batch[0]]  # no row stays in its place
    ids, mask = pad_rows([row.prompt for row in batch], pad, left=left)
    values, _ = model.forward(ids, mask, None, [row.adapter for row in batch])
    yield from _observe_batch(PERMUTED, batch, mask, values, task)


def _observe_batch(
    phase: str, batch: Sequence[Row], mask: Ids, values: NDArray[Any], task: str
) -> Iterator[Observation]:
    for row, real, its in zip(batch, mask.astype(bool), values, strict=True):
        yield Observation(phase, row, 0, _positions(its, real, task))


def generate(
    model: Model, prompts: Sequence[Sequence[int]], *, count: int, pad: int, adapter: str | None
) -> list[tuple[int, ...]]:
    """The `count` tokens that `model` finds the likeliest one after the other, for each prompt.

    The prompts are one batch.
    """
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


def has_logits(task: str) -> bool:
    """Whether a position of the first output is a distribution over tokens or labels."""
    return task not in (*FEATURES, VISION_TOWER)


def output_names(manifest: Manifest) -> tuple[str, ...]:
    """The outputs that are compared: the task's own, then what else there is but the cache."""
    first = output_of(manifest)
    named = [spec.name for spec in manifest.outputs if not spec.name.startswith(PRESENT)]
    return (first, *(name for name in named if name != first))


def joined(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """The outputs as one array: what is given for a row as a whole becomes its last positions."""
    first, *rest = values
    if not rest:
        return first
    return np.concatenate([first, *(value[:, np.newaxis] for value in rest)], axis=1)


def batch_size(longest: int, width: int, most: int = _MAX_ROWS) -> int:
    """How many rows of `longest` tokens with `width` values for each make one batch."""
    return min(most, max(2, min(_MAX_ROWS, _MAX_OUTPUT // (longest * width))))


def _batches(rows: Sequence[Row], *, most: int) -> Iterator[Sequence[Row]]:
    """`rows` in their order; those of one batch are followed for as many steps."""
    for _, group in groupby(rows, lambda row: (row.edge, len(row.forced))):
        alike = list(group)
        longest = max(len(row.prompt) for row in alike)
        count = batch_size(longest, alike[0].expected.shape[-1], most)
        starts = list(range(0, len(alike), count))
        # No batch of one row at the end: it would be no batch.
        if most > 1 and len(starts) > 1 and len(alike) - starts[-1] == 1:
            starts.pop()
        for start, stop in zip(starts, [*starts[1:], len(alike)], strict=True):
            yield alike[start:stop]


def _positions(values: NDArray[Any], real: NDArray[np.bool_], task: str) -> NDArray[Any]:
    """One row's values without the padding's, [positions, width].

    One answer for the whole row, as a classifier's, is one position.
    """
    if values.ndim == 1:
        return values[np.newaxis]
    if task == SEQ2SEQ_LM or task in IMAGES:
        return values  # the target's, or an image's
    whole_row = np.ones(max(0, len(values) - len(real)), bool)
    kept: NDArray[Any] = values[np.concatenate([real, whole_row])]
    return kept
