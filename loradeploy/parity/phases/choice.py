"""The phases of each task, and the rows that each phase runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.adapter.tasks import CAUSAL_LM, SEQ2SEQ_LM
from loradeploy.errors import UsageError, shown
from loradeploy.parity.names import (
    CHUNKED,
    DECODE,
    DECODER_PHASES,
    EMBEDDED,
    ENCODER,
    ENCODER_PHASES,
    PERMUTED,
    REPEAT,
    SEQ2SEQ_PHASES,
)
from loradeploy.parity.phases.fed import FED_ROWS

if TYPE_CHECKING:
    from loradeploy.parity.phases.rows import Row

# Number of rows that a phase runs, if not all.
_FEW: Final = {CHUNKED: 4, PERMUTED: 4, REPEAT: 2}
# Number of rows for decoding row by row, which takes long.
_DECODED_ALONE: Final = 4
# With fewer tokens, no chunk after the first has two, and a wrong mask there would have no effect.
_TO_CHUNK: Final = 4

_PHASES: Final = {CAUSAL_LM: DECODER_PHASES, SEQ2SEQ_LM: SEQ2SEQ_PHASES}


def phases_of(task: str, *, embeds: bool = False) -> tuple[str, ...]:
    """Return the phases of a task; `embeds`: whether the decoder takes embeddings."""
    known = _PHASES.get(task, ENCODER_PHASES)
    return (*known, EMBEDDED) if embeds else known


def choose_phases(task: str, asked: Sequence[str] | None, *, embeds: bool) -> tuple[str, ...]:
    """Return the phases of a task, or those of them in `asked` (with spaces or dashes).

    Raises:
        UsageError: `asked` is empty, or has a name that is not a phase of this task.
    """
    known = phases_of(task, embeds=embeds)
    if asked is None:
        return known
    named = [name.replace("-", " ") for name in asked]
    for name in named:
        if name not in known:
            phases = ", ".join(phase.replace(" ", "-") for phase in known)
            raise UsageError(f"{task} has no phase {shown(name)}: there are {phases}")
    if not named:
        raise UsageError("no phases are given: there is nothing to compare")
    return tuple(phase for phase in known if phase in named)


def rows_of(phase: str, rows: Sequence[Row], *, batched: bool = True) -> Sequence[Row]:
    """Return those of `rows` that a phase runs; see `phases.run.run_phases`."""
    if phase == DECODE and not batched:
        return rows[:_DECODED_ALONE]
    if phase == EMBEDDED:
        return [row for row in rows if row.fed is not None][:FED_ROWS]
    if phase == ENCODER:
        return [row for row in rows if row.encoded is not None]
    if phase not in _FEW:
        return rows
    few = [row for row in rows if not row.edge]
    if phase == CHUNKED:
        few = [row for row in few if len(row.tokens) >= _TO_CHUNK]
    if phase != PERMUTED:
        return few[: _FEW[phase]]
    # Of a mixed batch, every adapter keeps a row, so that a mix-up of the last ones shows.
    first = {row.adapter: place for place, row in reversed(list(enumerate(few)))}
    few = [row for i, row in enumerate(few) if i < _FEW[phase] or i == first[row.adapter]]
    return () if len(few) < 2 else few


def left_out(phase: str, rows: Sequence[Row], *, batched: bool = True) -> list[str | None]:
    """Return the adapters of `rows` without a row in the phase, if the phase has other rows."""
    shown = {row.adapter for row in rows_of(phase, rows, batched=batched)}
    every = dict.fromkeys(row.adapter for row in rows)
    return [adapter for adapter in every if shown and adapter not in shown]


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """Return `count` of `rows` spread over all lengths, the longest (largest error) included."""
    ordered = sorted(rows, key=lambda row: len(row.tokens))
    picks = np.unique(np.linspace(0, len(ordered) - 1, count).astype(int))
    return [ordered[pick] for pick in picks]
