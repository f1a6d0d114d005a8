"""Join the parts of an encoder-decoder that optimum exports to one graph of two halves.

    encoder     encoder_model
    keys and values of the encoder's states       the part of decoder_model that computes them
    decoder     decoder_with_past_model, which also computes the first tokens, with an empty cache

The result has the inputs and outputs of a traced encoder-decoder (`trace/encoder_decoder.py`).
The parts are run first: decoder_with_past_model must give the logits of decoder_model for several
tokens, with an empty cache and with tokens in it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

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
from loradeploy.errors import ExportError, first_line, listed_names
from loradeploy.export.graph.edit import (
    bodies_of,
    constant_of,
    remove_unused,
    taken_name,
    value_names,
)
from loradeploy.export.match.observe import open_model, sample_of
from loradeploy.export.read.files.repository import Parts
from loradeploy.export.read.half import name_encoder
from loradeploy.export.read.loaded import load_regular
from loradeploy.export.read.subgraphs import take_branch

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir
    import onnxruntime
    from numpy.typing import NDArray

    from loradeploy.bundle.sample import Feeds

_SWITCH: Final = "use_cache_branch"
# The inputs that the parts may have besides keys and values.
_ENCODERS: Final = (INPUT_IDS, ATTENTION_MASK, INPUT_FEATURES)
_FIRST: Final = (INPUT_IDS, ENCODER_HIDDEN_STATES, ENCODER_ATTENTION_MASK)
_FURTHER: Final = (INPUT_IDS, ENCODER_ATTENTION_MASK)
# Rows, tokens of source and target, and cached ones, of the runs that compare the parts.
_SIZES: Final = ((2, 5, 6, 3), (3, 7, 4, 1))
_ROUNDING: Final = 1e-2  # relative to the size of the logits, as in a bundle's trial
_ADVICE: Final = "export the PyTorch checkpoint, or give the file of one part"
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
    encoder, first, further = _loaded(parts)
    _check_inputs(encoder.graph, _ENCODERS, parts.encoder)
    _check_inputs(first.graph, _FIRST, parts.first)
    _check_inputs(further.graph, _FURTHER, parts.further)
    _check_outputs(encoder.graph, first.graph, further.graph, parts)
    made = _compared(encoder, first, further, parts.encoder.parent, config)
    name_encoder(encoder.graph, config)
    for value in further.graph.inputs:
        if value.name == INPUT_IDS:
            value.name = DECODER_INPUT_IDS
    given = [v for v in first.graph.outputs if is_cross(str(v.name))]
    _count_rows_of_states(first.graph)
    _keep(first, given)
    if any(value.name == INPUT_IDS for value in first.graph.inputs):
        raise ExportError(
            f"in {parts.first.name} the keys and values of the encoder's states depend on tokens,"
            f" so that the parts are not joined: {_ADVICE}"
        )
    _keep(further, [v for v in further.graph.outputs if not is_cross(str(v.name))])
    (states,) = (v for v in encoder.graph.outputs if v.name == LAST_HIDDEN_STATE)
    _keep(encoder, [states])
    for value in list(first.graph.inputs):
        if value.name == ENCODER_HIDDEN_STATES:
            value.replace_all_uses_with(states)
    of_sound = any(v.name == INPUT_FEATURES for v in encoder.graph.inputs)
    cached = sorted(further.graph.outputs, key=_order)
    inputs = [*encoder.graph.inputs, *further.graph.inputs]
    outputs = [*cached, *sorted(given, key=_order), *([states] if of_sound else [])]
    _check_opsets(encoder, first, further)
    _move(first, further)
    _move(encoder, further)
    if of_sound:
        states.name = ENCODER_HIDDEN_STATES
    further.graph.inputs.clear()
    further.graph.inputs.extend(inputs)
    further.graph.outputs.clear()
    further.graph.outputs.extend(outputs)
    further.graph.sort()
    return Joined(further, made.feeds, made.outputs)


def _loaded(parts: Parts) -> tuple[ir.Model, ir.Model, ir.Model]:
    """The encoder, and the decoder without and with a cache."""
    first, further = load_regular(parts.first), load_regular(parts.further)
    if parts.first == parts.further:
        take_branch(first, _SWITCH, value=False)
        take_branch(further, _SWITCH, value=True)
        _keep(first, list(first.graph.outputs))
        _keep(further, [v for v in further.graph.outputs if not is_cross(str(v.name))])
    return load_regular(parts.encoder), first, further


def _check_inputs(graph: ir.Graph, known: Sequence[str], file: Path) -> None:
    others = sorted(
        str(value.name)
        for value in graph.inputs
        if value.name not in known and not str(value.name).startswith(PAST)
    )
    if others:
        raise ExportError(
            f"{file.name} has other inputs ({listed_names(others, 3)}) than tokens, states, masks"
            f" and a cache, so that the parts are not joined: {_ADVICE}"
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
                f" with a cache (optimum's tasks that end in -with-past), or {_ADVICE}"
            )


def _names(values: Collection[ir.Value]) -> set[str]:
    return {str(value.name) for value in values}


def _check_opsets(*models: ir.Model) -> None:
    versions = {tuple(sorted(model.opset_imports.items())) for model in models}
    domains = {domain for each in versions for domain, _ in each}
    for domain in domains:
        found = sorted({version for each in versions for of, version in each if of == domain})
        if len(found) > 1:
            raise ExportError(
                f"the parts of the model have different opsets ({found[0]} and {found[-1]}):"
                " export them with one"
            )


# -- comparison ------------------------------------------------------------------------------------


def _compared(
    encoder: ir.Model,
    first: ir.Model,
    further: ir.Model,
    directory: Path,
    config: Mapping[str, Any],
) -> _Made:
    """The outputs of the parts for a sample.

    Raises:
        ExportError: the decoder with a cache gives other logits than the one without.
    """
    try:
        run = _Run(*(open_model(model, directory) for model in (encoder, first, further)))
        source, tokens = sample_of(encoder, config), sample_of(further, config)
        made = [
            run(source.feeds(rows, length), tokens.tokens(rows, target), cached)
            for rows, length, target, cached in _SIZES
        ]
    except Exception as problem:  # onnxruntime's exceptions have no common base class
        raise ExportError(
            f"the parts cannot be run here to compare them: {first_line(problem)}; {_ADVICE}"
        ) from None
    for one in made:
        for what, got, expected in one.pairs:
            slack = _ROUNDING * float(np.abs(expected).max(initial=0))
            if got.shape != expected.shape or not np.allclose(got, expected, rtol=0, atol=slack):
                raise ExportError(
                    f"the decoder with a cache gives other logits for several tokens after {what}"
                    f" than the one without, so that the parts are not joined: {_ADVICE}"
                )
    return made[0]


@dataclass(frozen=True, eq=False)
class _Made:
    """The `outputs` of a run for `feeds`; `pairs` of logits that have to be equal, and of what."""

    feeds: Feeds
    outputs: Feeds
    pairs: tuple[tuple[str, NDArray[Any], NDArray[Any]], ...]


@dataclass(frozen=True, eq=False)
class _Run:
    """Runs the parts on a source and on tokens of the target, at once and after a cache."""

    encoder: onnxruntime.InferenceSession
    first: onnxruntime.InferenceSession
    further: onnxruntime.InferenceSession

    def __call__(self, source: Feeds, tokens: NDArray[np.int64], cached: int) -> _Made:
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
        return _Made(feeds, outputs, pairs)

    def _cache(self, whole: Feeds, begun: Feeds, *, length: int) -> Feeds:
        """The cache of the source and of `length` tokens."""
        cache = {}
        for node in self.further.get_inputs():
            if node.name.startswith(PAST):
                present = present_of(node.name)
                own = not is_cross(node.name)
                cache[node.name] = begun[present][:, :, :length] if own else whole[present]
        return cache


def _outputs(session: onnxruntime.InferenceSession, feeds: Mapping[str, NDArray[Any]]) -> Feeds:
    names = [node.name for node in session.get_outputs()]
    given = {node.name: feeds[node.name] for node in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))


# -- surgery ---------------------------------------------------------------------------------------


def _keep(model: ir.Model, outputs: Sequence[ir.Value]) -> None:
    """Leave what the `outputs` need."""
    graph = model.graph
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    remove_unused(graph)
    for value in list(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)


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


def _move(model: ir.Model, target: ir.Model) -> None:
    """Move the nodes and weights of `model` into `target`, without its inputs and outputs.

    Names that `target` has get a suffix. A table of rows that both have is shared.
    """
    source, into = model.graph, target.graph
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
