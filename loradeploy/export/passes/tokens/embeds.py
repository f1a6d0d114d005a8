"""Add inputs for embeddings that replace those of tokens, such as the features of an image.

    embedding(input_ids) → layers     becomes     Where(mask, inputs_embeds, embedding) → layers

    inputs_embeds       [1, 1, hidden] zeros    the default
                        [batch, sequence, hidden]
    inputs_embeds_mask  [1, 1] False            the default: every token is embedded
                        [batch, sequence]       True where `inputs_embeds` is used instead

As in PyTorch, `inputs_embeds` replace the output of the embedding's module, including what it
computes after its table, such as Gemma's scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loradeploy.bundle.names import INPUTS_EMBEDS, INPUTS_EMBEDS_MASK
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import (
    Chain,
    add_constant,
    add_optional_input,
    constant_of,
    replace_uses,
)
from loradeploy.export.graph.file import spec_of
from loradeploy.export.graph.names import step_name
from loradeploy.export.graph.scopes import module_path
from loradeploy.export.match.whole.parts import embedding_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import TensorSpec


def add_inputs_embeds(model: ir.Model) -> tuple[TensorSpec, ...]:
    """Add the optional inputs `inputs_embeds` and `inputs_embeds_mask` to a decoder's graph.

    Raises:
        ExportError: the embedding of tokens is not found, is called several times, or has several
            outputs.
    """
    import onnx_ir as ir

    graph, embedding = model.graph, embedding_of(model)
    if embedding is None or len(embedding.nodes) != 1:
        raise ExportError("the graph has no single embedding of tokens that images could replace")
    (node,) = embedding.nodes
    embedded = _end_of(embedding.module, node.outputs[0])
    assert embedded.dtype is not None
    last = embedded.producer()
    assert last is not None
    width, dtype = constant_of(embedding.weight).shape[1], embedded.dtype.numpy()
    none, shape = np.zeros((1, 1, width), dtype), ("embeds_rows", "embeds")
    given = add_optional_input(graph, INPUTS_EMBEDS, none, [*shape, int(width)])
    mask = add_optional_input(graph, INPUTS_EMBEDS_MASK, np.zeros((1, 1), np.bool_), shape)
    axis = add_constant(graph, step_name(INPUTS_EMBEDS, "axis"), np.array([2], np.int64))
    chain = Chain(graph, last, INPUTS_EMBEDS, ir.DataType.BOOL)
    chosen = chain.add("Unsqueeze", "chosen", [mask, axis])  # [batch, sequence, 1]
    values = Chain(graph, chain.last, INPUTS_EMBEDS, embedded.dtype)
    result = values.add("Where", "read", [chosen, given, embedded])
    replace_uses(embedded, result, keep=[values.last])
    return tuple(map(spec_of, (given, mask)))


def sample_embeds(
    specs: Sequence[TensorSpec], ids: NDArray[np.int64]
) -> dict[str, NDArray[np.generic]]:
    """Random embeddings for two of every four tokens of `ids` [batch, sequence], for a trial.

    `specs`: begins with those of `add_inputs_embeds`.
    """
    given = specs[0]
    values = np.random.default_rng(0).standard_normal((*ids.shape, int(given.shape[-1])))
    places = np.isin(np.indices(ids.shape).sum(axis=0) % 4, (1, 2))
    return {INPUTS_EMBEDS: values.astype(given.dtype), INPUTS_EMBEDS_MASK: places}


def _end_of(module: str, value: ir.Value) -> ir.Value:
    """The output of `module`, which computes `value` and may continue with further nodes."""
    while own := [node for node, _ in value.uses() if module_path(node) == module]:
        if len(own) > 1 or len(own[0].outputs) > 1:
            raise ExportError(f"{module} has no single output that images could replace")
        value = own[0].outputs[0]
    return value
