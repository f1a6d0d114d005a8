"""Give a graph's inputs and outputs the names that transformers gives them.

input_ids:0, tokens, input_word_ids            input_ids
input_mask, mask                               attention_mask
segment_ids, input_type_ids                    token_type_ids
past_key_0, past_key_values_0_key              past_key_values.0.key
present_key_0, present_key_values.0.key        present.0.key

Some exporters, and TensorFlow's, have their own names, which nothing that makes text or feeds a
trial knows. Only values of the right rank and type get another name, those beside tokens only where
there are tokens, and a mask of a doubtful name only where 0 hides a token: other libraries' masks
are the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.names import (
    ATTENTION_MASK,
    INPUT_IDS,
    POSITION_IDS,
    TOKEN_TYPE_IDS,
    past_name,
    present_name,
)
from loradeploy.errors import ExportError
from loradeploy.export.match.observe import open_model, sample_of
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logger_of(__name__)

_OTHERS: Final[Mapping[str, tuple[str, ...]]] = {
    INPUT_IDS: ("tokens", "token_ids", "input_tokens", "input_word_ids", "ids", "input", "inputs"),
    ATTENTION_MASK: ("input_mask", "mask", "attn_mask", "attention_masks"),
    TOKEN_TYPE_IDS: ("segment_ids", "input_type_ids", "type_ids"),
    POSITION_IDS: ("positions", "position", "pos_ids"),
}
_TENSORFLOW: Final = re.compile(r":\d+$")
_CACHED: Final = re.compile(
    r"(past|present)[._](?:key_values[._])?(?:(key|value)s?[._](\d+)|(\d+)[._](key|value)s?)"
)
_DOUBTFUL: Final = ("mask", "attn_mask")
_HIDDEN: Final = 1  # the position that the doubtful mask has to hide
_ROUNDING: Final = 1e-3
_CACHE_RANK: Final = 4
_TOKENS_RANK: Final = 2


def name_values(model: ir.Model) -> dict[str, str]:
    """Rename the inputs and outputs; returns their names in the file by the new ones."""
    graph = model.graph
    taken = {v.name for node in graph.all_nodes() for v in node.outputs}
    taken |= {v.name for v in (*graph.inputs, *graph.initializers.values())}
    values: dict[str, ir.Value] = {}
    for value in (*graph.inputs, *graph.outputs):
        new = None if value.is_initializer() else _name_of(value)
        if new is not None and new not in taken:
            values.setdefault(new, value)
    if INPUT_IDS not in values and INPUT_IDS not in taken:
        values = {new: value for new, value in values.items() if new not in _OTHERS}
    before: dict[str, str] = {}
    for new, value in values.items():
        before[new], value.name = str(value.name), new
        logger.info("%s of the graph is called %s in the bundle", before[new], new)
    return before


def _name_of(value: ir.Value) -> str | None:
    """What the value is called by transformers; None if it is unknown, or has that name."""
    name, rank = str(value.name), None if value.shape is None else len(value.shape)
    if (cached := _CACHED.fullmatch(name)) is not None and rank == _CACHE_RANK:
        of, part, layer = cached[1], cached[2] or cached[5], int(cached[3] or cached[4])
        return past_name(layer, part) if of == "past" else present_name(layer, part)
    if not value.is_graph_input():
        return None
    plain = _TENSORFLOW.sub("", name)
    new = next((new for new, others in _OTHERS.items() if plain in (new, *others)), None)
    if new is None or rank != _TOKENS_RANK or value.dtype is None:
        return None
    return new if new == ATTENTION_MASK or value.dtype.is_integer() else None


def check_mask(
    model: ir.Model, renamed: Mapping[str, str], directory: Path, config: Mapping[str, Any]
) -> None:
    """Raise ExportError where a mask of a doubtful name hides another token than that with a 0.

    `renamed`: of `name_values`. `directory`: that of the graph's external data. `config`: that of
    the model. A graph that does not run here is not checked.
    """
    name = renamed.get(ATTENTION_MASK)
    if name not in _DOUBTFUL:
        return
    try:
        feeds = sample_of(model, config).feeds()
        if INPUT_IDS not in feeds or feeds[INPUT_IDS].shape != feeds[ATTENTION_MASK].shape:
            return
        feeds[ATTENTION_MASK][:, _HIDDEN] = 0
        session = open_model(model, directory)
        one = session.run(None, feeds)
        feeds[INPUT_IDS][:, _HIDDEN] = feeds[INPUT_IDS][:, _HIDDEN + 1]
        two = session.run(None, feeds)
    except Exception:  # onnxruntime's own errors, of many kinds
        return
    for before, after in zip(one, two, strict=True):
        if before.ndim > _TOKENS_RANK and before.shape[1] == feeds[INPUT_IDS].shape[1]:
            before, after = (np.delete(values, _HIDDEN, axis=1) for values in (before, after))
        elif before.ndim > _TOKENS_RANK:
            continue  # the cache, with the hidden position in it
        if not np.allclose(
            before, after, rtol=_ROUNDING, atol=_ROUNDING * float(np.abs(before).max(initial=0))
        ):
            raise ExportError(
                f"the graph's input {name} does not hide a token where it is 0, so that it is not"
                f" transformers' {ATTENTION_MASK}: export the graph with one"
            )
