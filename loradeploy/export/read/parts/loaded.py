"""Load the parts of an encoder-decoder, and check that each gives what the others take."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loradeploy.bundle.names import (
    ATTENTION_MASK,
    ENCODER_ATTENTION_MASK,
    ENCODER_HIDDEN_STATES,
    INPUT_FEATURES,
    INPUT_IDS,
    LAST_HIDDEN_STATE,
    LOGITS,
    PAST,
    is_cross,
    present_of,
)
from loradeploy.errors import ExportError, listed_names
from loradeploy.export.graph.edit import keep_outputs
from loradeploy.export.read.files.repository import Parts
from loradeploy.export.read.loaded import load_regular
from loradeploy.export.read.subgraphs import take_branch
from loradeploy.export.read.values.cache_position import compute_cache_position

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

ADVICE: Final = "export the PyTorch checkpoint, or give the file of one part"

_SWITCH: Final = "use_cache_branch"
# The inputs that the parts may have besides keys and values.
_ENCODERS: Final = (INPUT_IDS, ATTENTION_MASK, INPUT_FEATURES)
_FIRST: Final = (INPUT_IDS, ENCODER_HIDDEN_STATES, ENCODER_ATTENTION_MASK)
_FURTHER: Final = (INPUT_IDS, ENCODER_ATTENTION_MASK)


@dataclass(frozen=True, eq=False)
class LoadedParts:
    """The graphs of the encoder, and of the decoder without and with a cache."""

    encoder: ir.Model
    first: ir.Model
    further: ir.Model


def load_parts(parts: Parts) -> LoadedParts:
    """The graphs of the `parts`.

    Raises:
        ModelError: a part is not a valid graph.
        ExportError: they are not parts of one model.
    """
    first, further = load_regular(parts.first), load_regular(parts.further)
    if parts.first == parts.further:
        take_branch(first, _SWITCH, value=False)
        take_branch(further, _SWITCH, value=True)
        keep_outputs(first, list(first.graph.outputs))
        keep_outputs(further, [v for v in further.graph.outputs if not is_cross(str(v.name))])
    for decoder in (first, further):
        compute_cache_position(decoder.graph)
    encoder = load_regular(parts.encoder)
    _check_inputs(encoder.graph, _ENCODERS, parts.encoder)
    _check_inputs(first.graph, _FIRST, parts.first)
    _check_inputs(further.graph, _FURTHER, parts.further)
    _check_outputs(encoder.graph, first.graph, further.graph, parts)
    return LoadedParts(encoder, first, further)


def _check_inputs(graph: ir.Graph, known: Sequence[str], file: Path) -> None:
    others = sorted(
        str(value.name)
        for value in graph.inputs
        if value.name not in known and not str(value.name).startswith(PAST)
    )
    if others:
        raise ExportError(
            f"{file.name} has other inputs ({listed_names(others, 3)}) than tokens, states, masks"
            f" and a cache, so that the parts are not joined: {ADVICE}"
        )


def _check_outputs(encoder: ir.Graph, first: ir.Graph, further: ir.Graph, parts: Parts) -> None:
    """Raise ExportError unless the parts give each other what they take."""
    cached = {str(v.name) for v in further.inputs if str(v.name).startswith(PAST)}
    needed = {
        parts.encoder: {LAST_HIDDEN_STATE} - _names(encoder.outputs),
        parts.first: {LOGITS, *map(present_of, cached)} - _names(first.outputs),
        parts.further: {LOGITS, *(present_of(n) for n in cached if not is_cross(n))}
        - _names(further.outputs),
    }
    for file, lacking in needed.items():
        if lacking or not any(map(is_cross, cached)):
            what = f"it gives no {min(lacking)}" if lacking else "the decoder takes no cache"
            raise ExportError(
                f"the parts of {file.parent} are not joined, in {file.name}: {what}: export them"
                f" with a cache (optimum's tasks that end in -with-past), or {ADVICE}"
            )


def _names(values: Collection[ir.Value]) -> set[str]:
    return {str(value.name) for value in values}
