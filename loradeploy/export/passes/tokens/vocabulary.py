"""Resize a graph's vocabulary: the rows of its embedding and of its output head.

New rows are zeros until an adapter's rows replace them; rows beyond a smaller vocabulary are
removed. The shapes of the logits follow.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.adapter.fitting.vocabulary import Vocabulary
from loradeploy.bundle.names import DECODER_INPUT_IDS
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import constant_of, set_constant
from loradeploy.export.match.linears import Findings, Linear, output_head
from loradeploy.export.match.whole.parts import embedding_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

# Operators between a weight and its product.
_WEIGHT_CARRIERS: Final = ("Cast", "Identity", "Transpose")


def vocabulary_in(model: ir.Model, findings: Findings) -> Vocabulary | None:
    """The graph's vocabulary; None if its embedding of tokens is not known."""
    embedding, head = embedding_of(model), _head(model, findings)
    if embedding is None or any(v.name == DECODER_INPUT_IDS for v in model.graph.inputs):
        return None  # the halves of an encoder-decoder have separate tables
    size, name = embedding.shape[0], embedding.module
    if head is None or head.out_features != size:
        return Vocabulary(size, name)
    tied = not head.quantized and (
        head.weight is embedding.weight
        or np.array_equal(_by_token(head), constant_of(embedding.weight))
    )
    return Vocabulary(size, name, head.module, tied=tied, biased=head.bias is not None)


def tables_in(model: ir.Model, findings: Findings) -> dict[str, NDArray[np.generic]]:
    """The unquantized weights with a row per token [tokens, size], by parameter."""
    embedding, head = embedding_of(model), _head(model, findings)
    found = {}
    if embedding is not None:
        found[f"{embedding.module}.weight"] = constant_of(embedding.weight)
    if head is not None and not head.quantized and head.slice is None:
        found[f"{head.module}.weight"] = _by_token(head)
    return found


def resize_vocabulary(model: ir.Model, findings: Findings, size: int, why: str) -> Findings:
    """Resize the graph's vocabulary to `size` tokens; return the findings with the new head.

    `why`: the reason for resizing, and what to do instead, for the message of the error.

    Raises:
        ExportError: the head is quantized, or fused with other modules.
    """
    embedding, head = embedding_of(model), _head(model, findings)
    assert embedding is not None
    before = embedding.shape[0]
    if size == before:
        return findings
    if head is not None and (head.quantized or head.slice is not None):
        form = "quantized" if head.quantized else "fused with others"
        raise ExportError(f"{head.module} is {form}, and {why}")
    _set(embedding.weight, _resized(constant_of(embedding.weight), size, axis=0))
    if head is None or head.out_features != before:
        return findings
    axis = 0 if head.transposed else 1
    if head.weight is not embedding.weight:
        _set(head.weight, _resized(constant_of(head.weight), size, axis))
    if head.bias is not None:
        _set(head.bias, _resized(constant_of(head.bias), size, axis=-1))
    for node in head.nodes:
        _forget_shapes(node.inputs[1])
        _resize_outputs(node.outputs[0], before, size)
    linears = {**findings.linears, head.module: dataclasses.replace(head, out_features=size)}
    return dataclasses.replace(findings, linears=linears)


def _head(model: ir.Model, findings: Findings) -> Linear | None:
    name = output_head(model, findings)
    return None if name is None else findings.linears[name]


def _by_token(head: Linear) -> NDArray[np.generic]:
    numbers = constant_of(head.weight)
    return numbers if head.transposed else numbers.T


def _resized(numbers: NDArray[np.generic], size: int, axis: int) -> NDArray[np.generic]:
    axis %= numbers.ndim
    kept = numbers.take(range(min(size, numbers.shape[axis])), axis=axis)
    widths = [(0, size - kept.shape[axis] if index == axis else 0) for index in range(kept.ndim)]
    return np.ascontiguousarray(np.pad(kept, widths))


def _set(value: ir.Value, numbers: NDArray[np.generic]) -> None:
    import onnx_ir as ir

    set_constant(value, numbers)
    value.shape = ir.Shape(numbers.shape)


def _forget_shapes(value: ir.Value | None) -> None:
    """Clear the shapes of the values between a weight and its product."""
    while (
        value is not None
        and (node := value.producer()) is not None
        and node.op_type in _WEIGHT_CARRIERS
    ):
        value.shape = None
        value = node.inputs[0]


def _resize_outputs(value: ir.Value, before: int, size: int) -> None:
    """Set the last dimension to `size` from the head's output `value` to the logits."""
    import onnx_ir as ir

    if value.shape is not None and value.shape[-1] == before:
        value.shape = ir.Shape([*value.shape[:-1], size])
    if value.is_graph_output():
        return
    for node, _ in value.uses():
        for output in node.outputs:
            _resize_outputs(output, before, size)
