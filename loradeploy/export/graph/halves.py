"""Split an encoder-decoder into the two graphs of a bundle, and join them for an export.

An export works on one graph of two halves that share nothing but weights. A bundle has a file for
each half, encoder.onnx and model.onnx (the decoder), with their weights in the same
model.onnx.data; `join` makes one graph of them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from loradeploy.bundle.manifest import EncoderGraph, Manifest
from loradeploy.bundle.names import (
    DECODER_INPUT_IDS,
    ENCODER_ATTENTION_MASK,
    ENCODER_HIDDEN_STATES,
    ENCODER_NAME,
    GRAPH_NAME,
    PAST,
    is_cross,
)
from loradeploy.export.graph.file import load_graph
from loradeploy.export.graph.file import outputs as outputs_of
from loradeploy.files import atomic_file

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.bundle.manifest import TensorSpec


def encoder_of(inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> EncoderGraph | None:
    """The encoder's inputs and outputs; None if the graph has no cross-attention cache."""
    made = [spec.name for spec in outputs]
    if not any(map(is_cross, made)):
        return None
    taken = tuple(
        spec.name
        for spec in inputs
        if not spec.name.startswith(PAST)
        and spec.name not in (DECODER_INPUT_IDS, ENCODER_ATTENTION_MASK)
    )
    given = tuple(name for name in made if is_cross(name) or name == ENCODER_HIDDEN_STATES)
    return EncoderGraph(taken, given)


def write_halves(directory: Path, manifest: Manifest) -> None:
    """Split model.onnx in `directory`, which has both halves, into encoder.onnx and model.onnx."""
    import onnx_ir as ir

    assert manifest.encoder is not None
    encoder = set(manifest.encoder.outputs)
    decoder = {spec.name for spec in manifest.outputs} - encoder
    for name, kept in ((ENCODER_NAME, encoder), (GRAPH_NAME, decoder)):
        half = _half(directory / GRAPH_NAME, kept, manifest.encoder.inputs, name == ENCODER_NAME)
        with atomic_file(directory / name) as temporary:
            ir.save(half, temporary)


def _half(file: Path, kept: Collection[str], sources: Collection[str], encoder: bool) -> ir.Model:
    """The part of the graph in `file` that computes the outputs `kept`."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    model = ir.load(file)
    graph = model.graph
    for value in [value for value in graph.outputs if value.name not in kept]:
        graph.outputs.remove(value)
    common.RemoveUnusedNodesPass()(model)
    given = set(graph.outputs)
    for value in list(graph.inputs):
        # Both halves keep all side inputs, so that each takes an adapter's whole file.
        if not value.is_initializer() and (value.name in sources) is not encoder:
            graph.inputs.remove(value)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in given and not value.is_graph_input():
            graph.initializers.pop(name)
    common.RemoveUnusedOpsetsPass()(model)
    return model


def load_bundle_graph(directory: Path, manifest: Manifest) -> ir.Model:
    """Load the graph of the bundle in `directory`; both halves of an encoder-decoder, joined.

    Raises: as `load_graph`.
    """
    decoder = load_graph(directory / GRAPH_NAME)
    if manifest.encoder is None:
        return decoder
    return join(load_graph(directory / ENCODER_NAME), decoder, manifest)


def join(encoder: ir.Model, decoder: ir.Model, manifest: Manifest) -> ir.Model:
    """Move the nodes of `encoder` into `decoder` and return it; `encoder` is left empty.

    Values with the same name were one value before the split. Inputs and outputs are in the order
    of the manifest.
    """
    import onnx_ir as ir

    into, source = decoder.graph, encoder.graph
    known: dict[str, ir.Value] = {str(value.name): value for value in into.inputs}
    known.update({str(name): value for name, value in into.initializers.items()})
    known.update({str(value.name): value for node in into for value in node.outputs})
    outputs = list(source.outputs)
    inputs, initializers = list(source.inputs), dict(source.initializers)
    source.outputs.clear()
    source.inputs.clear()
    source.initializers.clear()

    def shared(value: ir.Value) -> bool:
        other = known.get(str(value.name))
        if other is None:
            return False
        ir.convenience.replace_all_uses_with(value, other)
        return True

    taken = [value for value in inputs if not shared(value)]
    for name, value in initializers.items():
        if name not in known and not shared(value):
            into.register_initializer(value)
    moved = []
    for node in list(source):
        source.remove(node)
        twice = [shared(value) for value in node.outputs]
        if not any(twice):
            moved.append(node)
    first = into[0] if len(into) else None
    if first is None:
        into.extend(moved)
    else:
        into.insert_before(first, moved)
    into.inputs.extend(taken)
    into.outputs.extend(outputs)
    order = {spec.name: at for at, spec in enumerate((*manifest.inputs, *manifest.side_inputs()))}
    ordered = sorted(into.inputs, key=lambda value: order.get(str(value.name), len(order)))
    into.inputs.clear()
    into.inputs.extend(ordered)
    order = {spec.name: at for at, spec in enumerate(manifest.outputs)}
    given = sorted(into.outputs, key=lambda value: order.get(str(value.name), len(order)))
    into.outputs.clear()
    into.outputs.extend(given)
    into.sort()
    for domain, version in encoder.opset_imports.items():
        decoder.opset_imports.setdefault(domain, version)
    return decoder


def with_encoder_outputs(model: ir.Model, manifest: Manifest) -> Manifest:
    """The manifest with the outputs of `model`; the encoder's are those that use its inputs."""
    if manifest.encoder is None:
        return dataclasses.replace(manifest, outputs=outputs_of(model))
    seen = {value for value in model.graph.inputs if value.name in manifest.encoder.inputs}
    for node in model.graph:
        if any(value in seen for value in node.inputs):
            seen.update(node.outputs)
    own = tuple(str(value.name) for value in model.graph.outputs if value in seen)
    encoder = dataclasses.replace(manifest.encoder, outputs=own, graph_digest=None)
    return dataclasses.replace(manifest, outputs=outputs_of(model), encoder=encoder)


def with_digests(manifest: Manifest, digest: str) -> Manifest:
    """The manifest with the `digest` of encoder.onnx."""
    assert manifest.encoder is not None
    encoder = dataclasses.replace(manifest.encoder, graph_digest=digest)
    return dataclasses.replace(manifest, encoder=encoder)
