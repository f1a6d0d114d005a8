"""Join the parts of an encoder-decoder that optimum exports to one graph of two halves.

    encoder     encoder_model
    keys and values of the encoder's states       the part of decoder_model that computes them
    decoder     decoder_with_past_model, which also computes the first tokens, with an empty cache

The result has the inputs and outputs of a traced encoder-decoder (`trace/encoder_decoder.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.names import (
    DECODER_INPUT_IDS,
    ENCODER_HIDDEN_STATES,
    INPUT_FEATURES,
    INPUT_IDS,
    LAST_HIDDEN_STATE,
    PRESENT,
    is_cross,
)
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import (
    bodies_of,
    constant_of,
    keep_outputs,
    taken_name,
    value_names,
)
from loradeploy.export.read.files.repository import Parts
from loradeploy.export.read.half import name_encoder
from loradeploy.export.read.parts.aligned import align_parts
from loradeploy.export.read.parts.compared import compare_parts
from loradeploy.export.read.parts.loaded import ADVICE, LoadedParts, load_parts

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.bundle.sample import Feeds

_LAYER: Final = re.compile(r"\d+")


@dataclass(frozen=True, eq=False)
class Joined:
    """The graph of both halves, and the `outputs` of the parts for `feeds`."""

    model: ir.Model
    feeds: Feeds
    outputs: Feeds


def join_parts(parts: Parts, config: Mapping[str, Any]) -> Joined:
    """The graph of the `parts` of a model with the config `config`.

    Raises:
        ModelError: a part is not a valid graph.
        ExportError: they are not parts of one model, or give different logits.
    """
    loaded = load_parts(parts)
    made = compare_parts(loaded, parts.encoder.parent, config)
    loaded = align_parts(loaded)
    name_encoder(loaded.encoder.graph, config)
    _rename_tokens(loaded.further.graph)
    _keep_cross(loaded.first, parts.first.name)
    return Joined(_join(loaded), made.feeds, made.outputs)


def _rename_tokens(decoder: ir.Graph) -> None:
    for value in decoder.inputs:
        if value.name == INPUT_IDS:
            value.name = DECODER_INPUT_IDS


def _keep_cross(first: ir.Model, file: str) -> None:
    """Leave what computes the keys and values of the encoder's states.

    Raises:
        ExportError: they depend on tokens.
    """
    _count_rows_of_states(first.graph)
    keep_outputs(first, [v for v in first.graph.outputs if is_cross(str(v.name))])
    if any(value.name == INPUT_IDS for value in first.graph.inputs):
        raise ExportError(
            f"in {file} the keys and values of the encoder's states depend on tokens,"
            f" so that the parts are not joined: {ADVICE}"
        )


def _join(parts: LoadedParts) -> ir.Model:
    """The decoder with a cache, with the other parts before it; these are left empty."""
    encoder, first, further = parts.encoder.graph, parts.first.graph, parts.further.graph
    (states,) = (v for v in encoder.outputs if v.name == LAST_HIDDEN_STATE)
    keep_outputs(parts.encoder, [states])
    keep_outputs(parts.further, [v for v in further.outputs if not is_cross(str(v.name))])
    for value in first.inputs:
        if value.name == ENCODER_HIDDEN_STATES:
            value.replace_all_uses_with(states)
    of_sound = any(v.name == INPUT_FEATURES for v in encoder.inputs)
    cached, cross = sorted(further.outputs, key=_order), sorted(first.outputs, key=_order)
    inputs = [*encoder.inputs, *further.inputs]
    outputs = [*cached, *cross, *([states] if of_sound else [])]
    _move(first, further)
    _move(encoder, further)
    if of_sound:
        states.name = ENCODER_HIDDEN_STATES
    further.inputs.clear()
    further.inputs.extend(inputs)
    further.outputs.clear()
    further.outputs.extend(outputs)
    further.sort()
    return parts.further


def _count_rows_of_states(graph: ir.Graph) -> None:
    """Read the number of rows from the encoder's states where it is that of a decoder's value.

    Otherwise the keys and values of the states need the decoder's layers for their shapes.
    """
    (states,) = (value for value in graph.inputs if value.name == ENCODER_HIDDEN_STATES)
    for node in graph:
        if node.op_type == "Shape" and _gives_rows(node):
            node.replace_input_with(0, states)


def _gives_rows(shape: ir.Node) -> bool:
    """Whether only the first size of a Shape node is used."""
    output = shape.outputs[0]
    return not output.is_graph_output() and all(
        user.op_type == "Gather"
        and index == 0
        and (at := user.inputs[1]) is not None
        and at.is_initializer()
        and not constant_of(at).any()
        for user, index in output.uses()
    )


def _order(value: ir.Value) -> tuple[int, ...]:
    """Logits first, then keys and values by layer."""
    name = str(value.name)
    return (name.startswith(PRESENT), *map(int, _LAYER.findall(name)), name.endswith("value"))


def _move(source: ir.Graph, into: ir.Graph) -> None:
    """Move the nodes and weights of `source` into `into`, without its inputs and outputs.

    Names that `into` has get a suffix. A table of rows that both have is shared.
    """
    names = value_names(into)
    tables = [value for value in into.initializers.values() if _is_table(value)]
    source.outputs.clear()
    source.inputs.clear()
    weights = list(source.initializers.values())
    source.initializers.clear()
    for value in weights:
        same = next((t for t in tables if _is_table(value) and _equal(t, value)), None)
        if same is not None:
            value.replace_all_uses_with(same)
            continue
        value.name = taken_name(names, str(value.name))
        if value.const_value is not None:
            value.const_value.name = value.name
        into.register_initializer(value)
    nodes = list(source)
    source.remove(nodes)
    _rename(nodes, names)
    labels = {str(node.name) for node in into}
    for node in nodes:
        if node.name:  # onnxruntime wants each name once
            node.name = taken_name(labels, node.name)
    into.insert_before(into[0], nodes)


def _rename(nodes: Iterable[ir.Node], names: set[str]) -> None:
    """Give the values of `nodes`, and of their branches and loops, names that none has."""
    for node in nodes:
        for value in node.outputs:
            if value.name:
                value.name = taken_name(names, value.name)
        for body in bodies_of(node):
            for value in body.inputs:
                value.name = taken_name(names, str(value.name))
            _rename(body, names)


def _is_table(value: ir.Value) -> bool:
    """Whether a weight is a table of rows, as of an embedding."""
    shape = value.shape
    return (
        shape is not None
        and len(shape) == 2
        and bool(value.uses())
        and all(node.op_type == "Gather" and index == 0 for node, index in value.uses())
    )


def _equal(one: ir.Value, other: ir.Value) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return np.array_equal(constant_of(one), constant_of(other))
