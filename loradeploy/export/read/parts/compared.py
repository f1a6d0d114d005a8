"""Compare the decoder without a cache with the one that has it, before they become one graph.

decoder_with_past_model must give the logits of decoder_model for several tokens, with an empty
cache and with tokens in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.dtypes import NUMPY_NAMES
from loradeploy.bundle.names import (
    ATTENTION_MASK,
    DECODER_INPUT_IDS,
    ENCODER_ATTENTION_MASK,
    ENCODER_HIDDEN_STATES,
    INPUT_FEATURES,
    INPUT_IDS,
    LAST_HIDDEN_STATE,
    LOGITS,
    PAST,
    PRESENT,
    is_cross,
    present_of,
)
from loradeploy.errors import ExportError, first_line
from loradeploy.export.match.observe import open_model, sample_of
from loradeploy.export.read.parts.loaded import ADVICE, LoadedParts

if TYPE_CHECKING:
    from pathlib import Path

    import onnxruntime
    from numpy.typing import NDArray

    from loradeploy.bundle.sample import Feeds

# Rows, tokens of source and target, and cached ones, of the runs that compare the parts.
_SIZES: Final = ((2, 5, 6, 3), (3, 7, 4, 1))
_ROUNDING: Final = 1e-2  # relative to the size of the logits, as in a bundle's trial


@dataclass(frozen=True, eq=False)
class Made:
    """The `outputs` of the parts for `feeds`; `pairs` of logits that must agree, and after what."""

    feeds: Feeds
    outputs: Feeds
    pairs: tuple[tuple[str, NDArray[Any], NDArray[Any]], ...]


def compare_parts(parts: LoadedParts, directory: Path, config: Mapping[str, Any]) -> Made:
    """The outputs of the `parts` of a model with the config `config` for a sample.

    `directory`: that of the graphs' external data.

    Raises:
        ExportError: the decoder with a cache gives other logits than the one without.
    """
    try:
        run = _Run(
            *(open_model(model, directory) for model in (parts.encoder, parts.first, parts.further))
        )
        source, tokens = sample_of(parts.encoder, config), sample_of(parts.further, config)
        made = [
            run(source.feeds(rows, length), tokens.tokens(rows, target), cached)
            for rows, length, target, cached in _SIZES
        ]
    except Exception as problem:  # onnxruntime's exceptions have no common base class
        raise ExportError(
            f"the parts cannot be run here to compare them: {first_line(problem)}; {ADVICE}"
        ) from None
    for one in made:
        for what, got, expected in one.pairs:
            slack = _ROUNDING * float(np.abs(expected).max(initial=0))
            if got.shape != expected.shape or not np.allclose(got, expected, rtol=0, atol=slack):
                raise ExportError(
                    f"the decoder with a cache gives other logits for several tokens after {what}"
                    f" than the one without, so that the parts are not joined: {ADVICE}"
                )
    return made[0]


@dataclass(frozen=True, eq=False)
class _Run:
    """Runs the parts on a source and on tokens of the target, at once and after a cache."""

    encoder: onnxruntime.InferenceSession
    first: onnxruntime.InferenceSession
    further: onnxruntime.InferenceSession

    def __call__(self, source: Feeds, tokens: NDArray[np.int64], cached: int) -> Made:
        mask = source.get(ATTENTION_MASK)
        if mask is not None:
            mask[-1, -1] = 0
        states = _outputs(self.encoder, source)[LAST_HIDDEN_STATE]
        given = {ENCODER_HIDDEN_STATES: states}
        masked = {} if mask is None else {ENCODER_ATTENTION_MASK: mask}
        whole = _outputs(self.first, {INPUT_IDS: tokens, **given, **masked})
        begun = _outputs(self.first, {INPUT_IDS: tokens[:, :cached], **given, **masked})
        empty = self._cache(whole, begun, length=0)
        alone = _outputs(self.further, {INPUT_IDS: tokens, **empty, **masked})
        rest = {**self._cache(whole, begun, length=cached), **masked}
        after = _outputs(self.further, {INPUT_IDS: tokens[:, cached:], **rest})
        feeds = {**source, DECODER_INPUT_IDS: tokens[:, cached:], **rest}
        outputs = {name: values for name, values in whole.items() if name.startswith(PRESENT)}
        outputs[LOGITS] = whole[LOGITS][:, cached:]
        if INPUT_FEATURES in source:
            outputs[ENCODER_HIDDEN_STATES] = states
        pairs = (
            ("an empty cache", alone[LOGITS], whole[LOGITS]),
            ("tokens in its cache", after[LOGITS], outputs[LOGITS]),
        )
        return Made(feeds, outputs, pairs)

    def _cache(self, whole: Feeds, begun: Feeds, *, length: int) -> Feeds:
        """The cache of the source and of `length` tokens."""
        cache = {}
        for node in self.further.get_inputs():
            if node.name.startswith(PAST):
                present = present_of(node.name)
                own = not is_cross(node.name)
                values = begun[present][:, :, :length] if own else whole[present]
                cache[node.name] = _as_taken(values, node.type)
        return cache


def _as_taken(values: NDArray[Any], kind: str) -> NDArray[Any]:
    """The values in the type that an input takes: parts may differ in their precision."""
    dtype = np.dtype(NUMPY_NAMES.get(kind, values.dtype.name))
    return values.astype(dtype) if values.dtype.kind == dtype.kind == "f" else values


def _outputs(session: onnxruntime.InferenceSession, feeds: Mapping[str, NDArray[Any]]) -> Feeds:
    names = [node.name for node in session.get_outputs()]
    given = {node.name: _as_taken(feeds[node.name], node.type) for node in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))
