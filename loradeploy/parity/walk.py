"""The way every backend takes through the inputs, and what it shows on it.

Decoders:  prefill        each prompt by itself, followed by the tokens that the reference chose
           padded batch   the prompts in batches, padded on the side that the graph wants
           decode         from that batch's cache on, the reference's tokens one a step
Encoders:  one row        each text by itself
           padded batch   the texts in batches, padded on the right

Since every backend is fed the tokens that the reference chose, its own greedy choice can be held
against the reference's at every step; up to the first difference it is what it would generate.

Of an image, a sound and an encoder-decoder's target, which the tokens of a row stand for (see
`feeds`), nothing is padded: a batch of them is just a batch.

What an encoder gives for a text as a whole (`pooler_output`) counts as one more position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from loradeploy.bundle.names import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    IMAGE_CLASSIFICATION,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
)
from loradeploy.export.tasks import TASK_TABLE
from loradeploy.runtime.tokenizer import pad as pad_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest

    Ids = NDArray[np.int64]

PREFILL: Final = "prefill"
ONE_ROW: Final = "one row"
PADDED_BATCH: Final = "padded batch"
DECODE: Final = "decode"

# What gives one answer for a row, rather than one for each position.
WHOLE_ROW: Final = (SEQUENCE_CLASSIFICATION, IMAGE_CLASSIFICATION)

# Rows of one batch, and the size of one output that a batch may have.
_MAX_ROWS: Final = 16
_MAX_OUTPUT: Final = 1 << 26  # values


class Model(Protocol):
    """A backend, opened."""

    def forward(
        self, ids: Ids, mask: Ids, cache: Any, subjects: Sequence[str | None]
    ) -> tuple[NDArray[Any], Any]:
        """`ids` [rows, new tokens] and `mask` [rows, all tokens] → values and the next cache.

        The values are [rows, new tokens, width], with one more position where there is an output
        for the whole row, or [rows, labels] of a classifier. `cache` is None at first, then what
        the call before returned. `subjects` names each row's adapter.
        """


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt with one adapter, and what the reference gives for it.

    `forced`: the tokens that the reference generated. `expected`: [positions, width]; positions
    are those of the prompt and of the forced tokens but the last, or one of a classifier.
    """

    case: int
    subject: str | None
    prompt: tuple[int, ...]
    forced: tuple[int, ...]
    expected: NDArray[np.float32]

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
        if phase == DECODE:
            return max(0, len(self.forced) - 1)
        batched = phase == PADDED_BATCH and self.forced
        return len(self.prompt) if batched else len(self.expected)


@dataclass(frozen=True, eq=False)
class Observation:
    """Consecutive positions of a row as a backend sees them: `values` [positions, width]."""

    phase: str
    row: Row
    first: int
    values: NDArray[Any]


def walk(
    model: Model,
    rows: Sequence[Row],
    *,
    task: str,
    pad: int,
    phases: Sequence[str],
    left: bool = True,
) -> Iterator[Observation]:
    """Take `model` through `rows`; phases that the task does not have are left out.

    `left`: whether a decoder's batches are padded there.
    """
    alone = PREFILL if task == CAUSAL_LM else ONE_ROW
    if alone in phases:
        for row in rows:
            ids = np.array([row.tokens], np.int64)
            mask = np.ones_like(ids)
            values, _ = model.forward(ids, mask, None, [row.subject])
            yield Observation(alone, row, 0, _positions(values[0], mask[0].astype(bool), task))
    if PADDED_BATCH in phases or DECODE in phases:
        for batch in _batches(rows):
            side = left and task == CAUSAL_LM
            yield from _walk_batch(model, batch, task=task, pad=pad, phases=phases, left=side)


def phases_of(task: str) -> tuple[str, ...]:
    """The phases that a task has."""
    return (PREFILL, PADDED_BATCH, DECODE) if task == CAUSAL_LM else (ONE_ROW, PADDED_BATCH)


def _walk_batch(
    model: Model,
    batch: Sequence[Row],
    *,
    task: str,
    pad: int,
    phases: Sequence[str],
    left: bool,
) -> Iterator[Observation]:
    subjects = [row.subject for row in batch]
    ids, mask = pad_rows([row.prompt for row in batch], pad, left=left)
    values, cache = model.forward(ids, mask, None, subjects)
    if PADDED_BATCH in phases:
        for row, real, its in zip(batch, mask.astype(bool), values, strict=True):
            yield Observation(PADDED_BATCH, row, 0, _positions(its, real, task))
    if DECODE not in phases:
        return
    for step in range(len(batch[0].forced) - 1):
        ids = np.array([[row.forced[step]] for row in batch], np.int64)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        values, cache = model.forward(ids, mask, cache, subjects)
        for row, its in zip(batch, values, strict=True):
            yield Observation(DECODE, row, len(row.prompt) + step, its)


def generate(
    model: Model, prompts: Sequence[Sequence[int]], *, count: int, pad: int, subject: str | None
) -> list[tuple[int, ...]]:
    """The `count` tokens that `model` finds the likeliest one after the other, for each prompt.

    The prompts are one batch.
    """
    ids, mask = pad_rows(prompts, pad, left=True)
    subjects = [subject] * len(prompts)
    chosen, cache = [], None
    for _ in range(count):
        values, cache = model.forward(ids, mask, cache, subjects)
        ids = values[:, -1].argmax(axis=-1)[:, None].astype(np.int64)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        chosen.append(ids[:, 0])
    return [tuple(row) for row in np.stack(chosen, axis=1).tolist()]


def has_logits(task: str) -> bool:
    """Whether a position of the first output is a distribution over tokens or labels."""
    return task != FEATURE_EXTRACTION


def output_names(manifest: Manifest) -> tuple[str, ...]:
    """The outputs that are compared: the task's own, then what else there is but the cache."""
    first = TASK_TABLE[manifest.task].output
    named = [spec.name for spec in manifest.outputs if not spec.name.startswith("present.")]
    return (first, *(name for name in named if name != first))


def joined(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """The outputs as one array: what is given for a row as a whole becomes its last positions."""
    first, *rest = values
    if not rest:
        return first
    return np.concatenate([first, *(value[:, np.newaxis] for value in rest)], axis=1)


def batch_size(longest: int, width: int) -> int:
    """How many rows of `longest` tokens with `width` values for each make one batch."""
    return max(2, min(_MAX_ROWS, _MAX_OUTPUT // (longest * width)))


def _batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    count = batch_size(max(len(row.prompt) for row in rows), rows[0].expected.shape[-1])
    # No batch of one row at the end: it would be no batch.
    starts = list(range(0, len(rows), count))
    if len(starts) > 1 and len(rows) - starts[-1] == 1:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        yield rows[start:stop]


def _positions(values: NDArray[Any], real: NDArray[np.bool_], task: str) -> NDArray[Any]:
    """One row's values without the padding's, [positions, width]; a classifier has one position."""
    if task in WHOLE_ROW:
        return values[np.newaxis]
    if task == SEQ2SEQ_LM:
        return values  # the target's
    whole_row = np.ones(max(0, len(values) - len(real)), bool)
    kept: NDArray[Any] = values[np.concatenate([real, whole_row])]
    return kept
