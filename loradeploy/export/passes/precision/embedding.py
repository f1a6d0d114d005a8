"""Store the token embedding of a quantized graph in 8 bits, a row per token.

y = W[ids] becomes y = (q[ids] − 128) · s[ids], with the blocks and scales of `quantize`. If the
output head is tied to the embedding, both use the same q. The operators are ONNX's own:
onnxruntime's GatherBlockQuantized (1.31) returns zeros for a token outside of the vocabulary, where
Gather reports an error.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import (
    Chain,
    add_constant,
    constant_of,
    free_name,
    remove_unused,
    replace_uses,
    shared_constant,
)
from loradeploy.export.graph.names import call_label, step_name
from loradeploy.export.match.quantized import unpacked
from loradeploy.export.match.whole.parts import Part, embedding_of
from loradeploy.export.passes.precision.quantize import packed_rows

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest

BITS: Final = 8
_ZERO: Final = 128  # how uint8 stores 0
_IDS_RANK: Final = 2  # [batch, sequence]
# The last name of the nodes that read the integers and the scales, and cut off the padding.
_PACKED, _SCALES, _CUT = "packed_gather", "scales_gather", "cut"


@dataclass(frozen=True, eq=False)
class PackedEmbedding:
    """A quantized embedding.

    `values`: the dequantized weight, [vocabulary, size]. `block`: the values that share a scale.
    """

    values: NDArray[np.float32]
    block: int


def quantize_embedding(model: ir.Model, manifest: Manifest) -> Manifest:
    """Quantize the embedding of `input_ids`; return the manifest that names it.

    Raises:
        ExportError: the graph has no such embedding, or adapters change it through side inputs.
    """
    part = embedding_of(model)
    if manifest.encoder is not None or part is None:
        raise ExportError(
            "`quantize_embedding` is for graphs with one known embedding of `input_ids`: leave it"
            " out"
        )
    changed = {target.module for target in manifest.targets if target.kind == "embedding"}
    if part.module in changed or manifest.added_tokens is not None:
        raise ExportError(
            f"adapters change {part.module} through side inputs, which `quantize_embedding` does"
            " not support: leave it out, or merge the adapter"
        )
    if any(_rank(node.inputs[1]) != _IDS_RANK for node in part.nodes):
        raise ExportError(
            f"the ids of {part.module} are not [batch, sequence]: leave `quantize_embedding` out"
        )
    _replace(model.graph, part)
    remove_unused(model.graph)
    return dataclasses.replace(manifest, quantized_embedding=part.module)


def packed_embedding(model: ir.Model, module: str) -> PackedEmbedding | None:
    """The quantized embedding of this name in a graph; None if its nodes are not there."""
    at = {step_name(module, step): step for step in (_PACKED, _SCALES, _CUT)}
    found = {at[str(node.name)]: node.inputs for node in model.graph if node.name in at}
    packed, scales = (found.get(step, [None])[0] for step in (_PACKED, _SCALES))
    if packed is None or scales is None:
        return None
    data = constant_of(packed)
    vocabulary, blocks, block = data.shape
    end = found[_CUT][2] if _CUT in found else None
    size = blocks * block if end is None else int(constant_of(end)[0])
    form = {"K": size, "N": vocabulary, "bits": BITS, "block_size": block}
    values = unpacked(form, data, constant_of(scales), None, list(range(vocabulary)))
    assert values is not None  # with 8 bits
    return PackedEmbedding(values, block)


def _replace(graph: ir.Graph, part: Part) -> None:
    import onnx_ir as ir

    table = constant_of(part.weight)  # [vocabulary, size]
    packed, scales = packed_rows(table, BITS)
    base = f"{part.module}.weight"
    data = _constant(graph, f"{base}.int{BITS}", packed)
    steps = _constant(graph, f"{base}.int{BITS}.scales", scales)
    last = shared_constant(graph, f"{base}.last_axis", np.array([-1], np.int64))
    kind = ir.DataType.from_numpy(table.dtype)
    zero = shared_constant(graph, f"{base}.zero", np.array(_ZERO, table.dtype))
    whole = shared_constant(graph, f"{base}.shape", np.array([0, 0, -1], np.int64))
    for call, node in enumerate(part.nodes):
        ids, old = node.inputs[1], node.outputs[0]
        assert ids is not None
        label = call_label(part.module, call)
        integers = Chain(graph, node, label, ir.DataType.UINT8)
        rows = integers.add("Gather", _PACKED, [data, ids], axis=0)  # [batch, sequence, blocks, 32]
        chain = Chain(graph, integers.last, label, kind)
        rows = chain.add("Cast", "packed_cast", [rows], to=int(kind))
        rows = chain.add("Sub", "packed_sub", [rows, zero])
        each = chain.add("Gather", _SCALES, [steps, ids], axis=0)  # [batch, sequence, blocks]
        each = chain.add("Unsqueeze", "scales_unsqueeze", [each, last])
        rows = chain.add("Mul", "scales_mul", [rows, each])
        new = chain.add("Reshape", "rows", [rows, whole])
        if packed.shape[1] * packed.shape[2] != table.shape[1]:
            new = _cut(graph, chain, new, table.shape[1])
        new.shape = old.shape
        chain.last.metadata_props.update(node.metadata_props)
        replace_uses(old, new)
        graph.remove(node, safe=True)


def _cut(graph: ir.Graph, chain: Chain, rows: ir.Value, size: int) -> ir.Value:
    """The first `size` values of each row; its last block is padded."""
    bounds = [
        shared_constant(graph, f"integers.{number}", np.array([number], np.int64))
        for number in (0, size, -1)
    ]
    return chain.add("Slice", _CUT, [rows, *bounds])


def _constant(graph: ir.Graph, name: str, numbers: NDArray[Any]) -> ir.Value:
    """The constant with these values, which the output head has if it is tied, or a new one."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if (
            tensor is not None
            and tensor.dtype.numpy() == numbers.dtype
            and tuple(tensor.shape.numpy()) == numbers.shape
            and np.array_equal(constant_of(value), numbers)
        ):
            return value
    return add_constant(graph, free_name(graph, name), numbers)


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)
