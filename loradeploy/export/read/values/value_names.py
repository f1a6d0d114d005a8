"""Rename a graph's inputs and outputs to transformers' names.

input_ids:0, tokens, input_word_ids            input_ids
input_mask, mask                               attention_mask
segment_ids, input_type_ids                    token_type_ids
past_key_0, past_key_values_0_key              past_key_values.0.key
present_key_0, present_key_values.0.key        present.0.key

Some exporters, such as TensorFlow's, use other names, which the runtime and the trial of a bundle
do not know. Only values of the right rank and type are renamed, those beside tokens only if there
are tokens, and a mask only if 0 hides a token: in some libraries 1 does.
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
from loradeploy.errors import ExportError, first_line
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
_HIDDEN: Final = 1  # the position that is masked in the test
_ROUNDING: Final = 1e-3
_CACHE_RANK: Final = 4
_TOKENS_RANK: Final = 2


def rename_values(model: ir.Model) -> dict[str, str]:
    """Rename the inputs and outputs; return their names in the file by the new ones."""
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
        logger.info("%s of the graph is named %s in the bundle", before[new], new)
    return before


def _name_of(value: ir.Value) -> str | None:
    """transformers' name of the value; None if it is unknown."""
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
    """Raise ExportError unless a renamed mask hides the token where it is 0.

    `renamed`: the result of `rename_values`. `directory`: that of the graph's external data.
    `config`: that of the model. A graph that cannot be run to test it is refused too.
    """
    name = renamed.get(ATTENTION_MASK)
    if name is None or _TENSORFLOW.sub("", name) == ATTENTION_MASK:
        return
    try:
        hides = _hides(model, directory, config)
    except Exception as problem:  # onnxruntime's exceptions have no common base class
        raise _in_doubt(name, f" ({first_line(problem)})") from None
    if hides is None:
        raise _in_doubt(name)
    if not hides:
        raise ExportError(
            f"the graph's input {name} does not hide a token where it is 0, so that it is not"
            f" transformers' {ATTENTION_MASK}: export the graph with one"
        )


def _in_doubt(name: str, why: str = "") -> ExportError:
    return ExportError(
        f"the graph cannot be run to see whether its input {name} hides a token where it is 0{why}:"
        f" if it does, rename it to {ATTENTION_MASK} in the graph"
    )


def _hides(model: ir.Model, directory: Path, config: Mapping[str, Any]) -> bool | None:
    """Whether changing the token where the mask is 0 changes no output of the other positions.

    None if no output shows it.
    """
    feeds = sample_of(model, config).feeds(past=0)
    tokens, mask = feeds[INPUT_IDS], feeds[ATTENTION_MASK]
    length = tokens.shape[1]
    cached = mask.shape[1] - length
    if cached < 0 or length <= _HIDDEN or tokens.min() == tokens.max():
        return None
    mask[:, cached + _HIDDEN] = 0
    session = open_model(model, directory)
    one = session.run(None, feeds)
    most = tokens.max()
    tokens[:, _HIDDEN] = np.where(tokens[:, _HIDDEN] == most, tokens.min(), most)
    two = session.run(None, feeds)
    hides = None
    for before, after in zip(one, two, strict=True):
        if before.ndim >= _CACHE_RANK:
            continue  # the cache, which includes the hidden position
        if before.ndim > _TOKENS_RANK or before.shape == tokens.shape:
            axis = next((axis for axis in (1, 0) if before.shape[axis] == length), None)
            if axis is not None:
                before, after = (np.delete(each, _HIDDEN, axis) for each in (before, after))
        slack = _ROUNDING * float(np.abs(before).max(initial=0))
        if not np.allclose(before, after, rtol=_ROUNDING, atol=slack):
            return False
        hides = True
    return hides
