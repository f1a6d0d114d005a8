"""Find the side on which rows of a batch are padded, by running a row alone and beside others.

    left    padding before the tokens: a decoder with positions from `position_ids` or the mask
    right   padding after the tokens: GroupQueryAttention, and an encoder that uses the mask
    none    rows of one length only: any padding changes the outputs

A decoder is also run for one more step, which shows the effect of padding in its cache, and on a
row in two parts, which shows whether its mask is right for several tokens after cached ones. One
without a cache is run with other tokens at the end, which shows whether it is a decoder at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    QUESTION_ANSWERING,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from loradeploy.bundle.names import (
    ATTENTION_MASK,
    INPUT_IDS,
    LEFT,
    NO_PADDING,
    PAST,
    POSITION_IDS,
    RIGHT,
    TOKEN_TYPE_IDS,
    present_of,
)
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import ExportError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest
    from loradeploy.bundle.sample import Sample
    from loradeploy.export.graph.running import Outputs
    from loradeploy.export.trial.opened import Trial

_ENCODERS: Final = (
    *(SEQUENCE_CLASSIFICATION, FEATURE_EXTRACTION, TOKEN_CLASSIFICATION),
    QUESTION_ANSWERING,
)
_FED: Final = (INPUT_IDS, ATTENTION_MASK, POSITION_IDS, TOKEN_TYPE_IDS)
_SHORT, _LONG = 3, 7
# The largest change of a row by rounding: relative to its size; as a multiple of the change by a
# neighbor of its own length (activations that are quantized together); and in any case.
_ROUNDING: Final = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 1e-3, "int8": 1e-2, "int4": 1e-2}
_NOISE: Final = 4.0
_MOST: Final = 0.2


def padding_by_trial(trial: Trial, sample: Sample, pad: int) -> str | None:
    """The side on which rows are padded; None if the graph cannot be run on rows of tokens."""
    manifest = trial.manifest
    decoder = manifest.task == CAUSAL_LM
    if not _can_be_tried(manifest, decoder):
        return None
    if not decoder:
        sides: tuple[str, ...] = (RIGHT,)
    elif not any(spec.name.startswith(PAST) for spec in manifest.inputs):
        sides = (RIGHT, LEFT)  # tokens do not attend to later ones
    else:
        sides = (RIGHT, LEFT) if manifest.padding == RIGHT else (LEFT, RIGHT)
    return _Rows(trial, sample, pad).padding(sides)


def reads_in_parts(trial: Trial, sample: Sample, pad: int) -> bool | None:
    """Whether a decoder's outputs are the same if it reads a text in parts, with its cache.

    None if it has no cache, or cannot be run on rows of tokens.
    """
    manifest = trial.manifest
    cached = any(spec.name.startswith(PAST) for spec in manifest.inputs)
    if manifest.task != CAUSAL_LM or not cached or not _can_be_tried(manifest, decoder=True):
        return None
    return _Rows(trial, sample, pad).in_parts()


def sees_later_tokens(trial: Trial, sample: Sample, pad: int) -> bool | None:
    """Whether the logits of a decoder without a cache change with the tokens after theirs.

    Those of a masked language model do: its outputs have the shapes of a decoder's, but no text can
    be generated with it. None if the graph has a cache, or cannot be run on rows of tokens.
    """
    manifest = trial.manifest
    cached = any(spec.name.startswith(PAST) for spec in manifest.inputs)
    if manifest.task != CAUSAL_LM or cached or not _can_be_tried(manifest, decoder=True):
        return None
    return _Rows(trial, sample, pad).changed_by_later_tokens()


def _can_be_tried(manifest: Manifest, decoder: bool) -> bool:
    inputs = {spec.name: spec for spec in manifest.inputs}
    if INPUT_IDS not in inputs or (not decoder and manifest.task not in _ENCODERS):
        return False
    known = all(name in _FED or name.startswith(PAST) for name in inputs)
    plain = [spec for name, spec in inputs.items() if not name.startswith(PAST)]
    is_open = all(
        len(spec.shape) == 2 and not any(isinstance(size, int) for size in spec.shape)
        for spec in plain
    )
    caches = [spec for name, spec in inputs.items() if name.startswith(PAST)]
    grows = all(len(s.shape) == 4 and not isinstance(s.shape[2], int) for s in caches)
    sized = all(isinstance(s.shape[1], int) and isinstance(s.shape[3], int) for s in caches)
    outputs = {spec.name for spec in manifest.outputs}
    goes_on = all(present_of(spec.name) in outputs for spec in caches)
    return known and is_open and grows and sized and goes_on


class _Rows:
    """Rows of two lengths, and the graph's outputs for them alone, together, and padded."""

    def __init__(self, trial: Trial, sample: Sample, pad: int) -> None:
        self._trial = trial
        self._manifest = trial.manifest
        self._pad = pad
        self._scores = output_of(trial.manifest)
        self._short = sample.tokens(2, _SHORT, seed=1)
        self._long, self._other = sample.tokens(2, _LONG, seed=2)
        self._next = sample.tokens(1, 1, seed=3)
        self._side_inputs = trial.random_side_inputs() or None

    def padding(self, sides: tuple[str, ...]) -> str | None:
        """The first of `sides` that changes no output, or `NO_PADDING`; None if no row runs."""
        try:
            alone = self._row_outputs(self._short[:1], np.ones((1, _SHORT), np.int64), [-1])
        except ExportError:
            return None
        if not all(np.isfinite(values).all() for values in alone):
            return None
        return next((side for side in sides if self._changes_nothing(side, alone)), NO_PADDING)

    def in_parts(self) -> bool | None:
        """Whether the longer row has the same outputs in two parts; None if no row runs."""
        ids, mask = self._long[np.newaxis], np.ones((1, _LONG), np.int64)
        begin = _SHORT  # the rest is several tokens
        try:
            whole = self._trial.run(self._feeds(ids, mask, None), self._side_inputs)[self._scores]
            short = self._row_outputs(self._short[:1], mask[:, :_SHORT], [-1])
            limit = self._limit(short)
        except ExportError:
            return None
        try:
            first = self._trial.run(
                self._feeds(ids[:, :begin], mask[:, :begin], None), self._side_inputs
            )
            rest = self._trial.run(self._feeds(ids[:, begin:], mask, first), self._side_inputs)
        except ExportError:
            return False
        found = rest[self._scores]
        expected = whole if whole.ndim == 2 else whole[:, -found.shape[1] :]
        return bool(_change(expected, found) <= limit)

    def changed_by_later_tokens(self) -> bool | None:
        """Whether the logits of the first tokens change with the others; None if no row runs."""
        mask = np.ones((1, _LONG), np.int64)
        other = self._other.copy()
        other[:_SHORT] = self._long[:_SHORT]
        try:
            one, two = (
                self._trial.run(self._feeds(ids[np.newaxis], mask, None), self._side_inputs)
                for ids in (self._long, other)
            )
            limit = self._limit(self._row_outputs(self._short[:1], mask[:, :_SHORT], [-1]))
        except ExportError:
            return None
        logits, changed = one[self._scores], two[self._scores]
        if logits.shape[1:-1] != (_LONG,):  # of the last token only
            return None
        if self._manifest.precision in ("int8", "int4"):
            limit = _MOST  # activations that are quantized together change with all tokens
        return bool(_change(logits[:, :_SHORT], changed[:, :_SHORT]) > limit)

    def _changes_nothing(self, side: str, alone: list[NDArray[Any]]) -> bool:
        try:
            change = _largest_change(alone, self._padded(side))
            return change <= self._rounding() or change <= self._limit(alone)
        except ExportError:  # the graph does not run on this batch
            return False

    def _rounding(self) -> float:
        """A change that is rounding, whatever a neighbor of the same length changes."""
        return _ROUNDING.get(self._manifest.precision, 1e-3)

    def _limit(self, alone: list[NDArray[Any]]) -> float:
        """The largest change by rounding, measured with a neighbor of the same length."""
        beside = self._row_outputs(self._short, np.ones((2, _SHORT), np.int64), [-1, -1])
        noise = _largest_change(alone, [values[:1] for values in beside])
        return min(max(self._rounding(), _NOISE * noise), _MOST)

    def _padded(self, side: str) -> list[NDArray[Any]]:
        """The outputs for the short row, beside a longer one."""
        ids = np.full((2, _LONG), self._pad, np.int64)
        mask = np.zeros_like(ids)
        tokens = slice(_LONG - _SHORT, None) if side == LEFT else slice(0, _SHORT)
        ids[0, tokens], mask[0, tokens] = self._short[0], 1
        ids[1], mask[1] = self._long, 1
        ends = [-1, -1] if side == LEFT else [_SHORT - 1, _LONG - 1]
        return [values[:1] for values in self._row_outputs(ids, mask, ends)]

    def _row_outputs(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], ends: list[int]
    ) -> list[NDArray[Any]]:
        """The outputs by row; for a decoder, the scores of the next token and of a further step."""
        outputs = self._trial.run(self._feeds(ids, mask, None), self._side_inputs)
        if self._manifest.task != CAUSAL_LM:
            return self._of_encoder(outputs, mask)
        first = outputs[self._scores]
        if first.ndim == 2:
            prefill = first  # of the last position only
        else:
            prefill = first[np.arange(len(ids)), ends if first.shape[1] == ids.shape[1] else -1]
        if not any(spec.name.startswith(PAST) for spec in self._manifest.inputs):
            return [prefill]
        step = np.repeat(self._next, len(ids), axis=0)
        mask = np.concatenate([mask, np.ones_like(step)], axis=1)
        after = self._trial.run(self._feeds(step, mask, outputs), self._side_inputs)
        last = after[self._scores]
        return [prefill, last if last.ndim == 2 else last[:, -1]]

    def _of_encoder(self, outputs: Outputs, mask: NDArray[np.int64]) -> list[NDArray[Any]]:
        """The rows of every output; with an axis of positions, only those that all rows have."""
        count, length = mask.shape
        rows = [values for values in outputs.values() if values.shape[:1] == (count,)]
        shared = int(mask.sum(axis=1).min())
        least = 2 if self._manifest.task == QUESTION_ANSWERING else 3  # axes
        return [v[:, :shared] if v.ndim >= least and v.shape[1] == length else v for v in rows]

    def _feeds(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], before: Mapping[str, Any] | None
    ) -> dict[str, NDArray[Any]]:
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        given = {
            INPUT_IDS: ids,
            ATTENTION_MASK: mask,
            POSITION_IDS: positions,
            TOKEN_TYPE_IDS: np.zeros_like(ids),
        }
        feeds: dict[str, NDArray[Any]] = {}
        for spec in self._manifest.inputs:
            if spec.name in given:
                feeds[spec.name] = given[spec.name].astype(spec.dtype)
            elif before is not None:
                feeds[spec.name] = before[present_of(spec.name)]
            else:
                _, heads, _, size = spec.shape
                feeds[spec.name] = np.zeros((len(ids), int(heads), 0, int(size)), spec.dtype)
        return feeds


def _largest_change(alone: list[NDArray[Any]], other: list[NDArray[Any]]) -> float:
    """The largest `_change` of several outputs; inf if their numbers differ."""
    if len(alone) != len(other):
        return float("inf")
    return max(map(_change, alone, other), default=0.0)


def _change(alone: NDArray[Any], other: NDArray[Any]) -> float:
    """The largest difference, relative to the largest value; inf for NaN or other shapes."""
    one, two = alone.astype(np.float64), other.astype(np.float64)
    if one.shape != two.shape or not np.isfinite(two).all():
        return float("inf")
    size = np.abs(one).max(initial=0.0)
    change = float(np.abs(one - two).max(initial=0.0))
    return change / size if size else change
