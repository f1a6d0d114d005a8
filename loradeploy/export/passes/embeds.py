"""Embeddings in the places of tokens: what a decoder reads of an image beside its text.

    embedding(input_ids) → layers     becomes     Where(mask, inputs_embeds, embedding) → layers

    inputs_embeds       [1, 1, hidden] zeros    the default
                        [batch, sequence, hidden]
    inputs_embeds_mask  [1, 1] False            the default: every token is embedded
                        [batch, sequence]       True where `inputs_embeds` is read instead

The image tokens may be beyond the vocabulary of some models: their ids are fed as 0 there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loradeploy.bundle.names import INPUTS_EMBEDS, INPUTS_EMBEDS_MASK
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import Chain, add_constant, constant_of, replace_uses
from loradeploy.export.graph.file import spec_of
from loradeploy.export.graph.names import step_name
from loradeploy.export.passes.vocabulary import embedding_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from loradeploy.bundle.manifest import TensorSpec


def add_inputs_embeds(model: ir.Model) -> tuple[TensorSpec, ...]:
    """Give the graph of a decoder the optional inputs `inputs_embeds` and `inputs_embeds_mask`.

    Raises:
        ExportError: its embedding of tokens is not found, or is called several times.
    """
    import onnx_ir as ir

    graph, embedding = model.graph, embedding_of(model)
    if embedding is None or len(embedding.nodes) != 1:
        raise ExportError("the graph has no single embedding of tokens that images could replace")
    (node,) = embedding.nodes
    embedded = node.outputs[0]
    table = constant_of(embedding.weight)
    given = add_constant(
        graph,
        INPUTS_EMBEDS,
        np.zeros((1, 1, table.shape[1]), table.dtype),
        shape=["embeds_rows", "embeds", int(table.shape[1])],
    )
    mask = add_constant(
        graph,
        INPUTS_EMBEDS_MASK,
        np.zeros((1, 1), np.bool_),
        shape=["embeds_rows", "embeds"],
    )
    graph.inputs.extend([given, mask])
    axis = add_constant(graph, step_name(INPUTS_EMBEDS, "axis"), np.array([2], np.int64))
    chain = Chain(graph, node, INPUTS_EMBEDS, ir.DataType.BOOL)
    chosen = chain.add("Unsqueeze", "chosen", [mask, axis])  # [batch, sequence, 1]
    assert embedded.dtype is not None
    values = Chain(graph, chain.last, INPUTS_EMBEDS, embedded.dtype)
    result = values.add("Where", "read", [chosen, given, embedded])
    replace_uses(embedded, result, keep=[values.last])
    return tuple(map(spec_of, (given, mask)))
