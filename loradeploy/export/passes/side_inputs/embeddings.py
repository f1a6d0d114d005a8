"""LoRA on an embedding as side inputs: y = W[ids] + A[adapter_ids, ids] B[adapter_ids].

`M.lora_A` [adapters, vocabulary, rank] and `M.lora_B` [adapters, rank, size]: only the rows of A
for the tokens are read, so that no row of the batch needs a copy of the whole table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loradeploy.bundle.manifest import LoraTarget
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import replace_uses
from loradeploy.export.graph.names import LORA_ADD, call_label
from loradeploy.export.match.observe import FRONT, seen_at
from loradeploy.export.match.whole.parts import Part
from loradeploy.export.passes.side_inputs.surgery import Surgery, first_input

if TYPE_CHECKING:
    import onnx_ir as ir


def has_token_rows(graph: ir.Graph, part: Part) -> bool:
    """Whether the embedding's ids are [batch, sequence], so that factors can differ by row."""
    first = first_input(graph)
    if first is None or not first.shape:
        return False
    for node in part.nodes:
        ids = node.inputs[1]
        seen = None if ids is None else seen_at(ids)
        if seen is not None:
            if seen.rows != FRONT or len(seen.shape) != 2:
                return False
            continue
        if ids is None or ids.shape is None or len(ids.shape) != 2:
            return False
        if ids.shape[0] != first.shape[0]:
            return False
    return True


def add_embedding_factors(surgery: Surgery, part: Part) -> LoraTarget:
    """y = W[ids] → y = W[ids] + A[ids] B, at every call of the embedding.

    Raises:
        ExportError: the ids are not [batch, sequence].
    """
    if not has_token_rows(surgery.graph, part):
        raise ExportError(
            f"{part.module} is an embedding of ids that are not [batch, sequence], which cannot"
            " have separate adapters: merge the adapter instead"
        )
    vocabulary, size = part.shape
    A, B = surgery.factors(part.module, vocabulary, size)
    for call, node in enumerate(part.nodes):
        _add_at(surgery, call_label(part.module, call), node, A, B)
    target = part.target()
    assert target is not None
    return target


def _add_at(surgery: Surgery, label: str, node: ir.Node, A: ir.Value, B: ir.Value) -> None:
    import onnx_ir as ir

    ids, y = node.inputs[1], node.outputs[0]
    assert ids is not None
    numbers = surgery.chain(node, label, ir.DataType.INT64)
    if ids.dtype != ir.DataType.INT64:
        ids = numbers.add("Cast", "ids", [ids], to=int(ir.DataType.INT64))
    last, row = surgery.integers("last_axis", [-1]), surgery.integers("row_axes", [1, 2])
    token = numbers.add("Unsqueeze", "token", [ids, last])  # [batch, sequence, 1]
    slot = numbers.add("Unsqueeze", "slot", [surgery.ids, row])  # [rows, 1, 1]
    shape = numbers.add("Shape", "shape", [token])
    slot = numbers.add("Expand", "slots", [slot, shape])  # [batch, sequence, 1]
    entry = numbers.add("Concat", "entry", [slot, token], axis=-1)  # [batch, sequence, 2]
    chain = surgery.chain(numbers.last, label)
    low = chain.add("GatherND", "lora_A_gather", [A, entry])  # [batch, sequence, rank]
    b = chain.add("Gather", "lora_B_gather", [B, surgery.ids], axis=0)  # [rows, rank, size]
    delta = chain.add("MatMul", "lora_B_matmul", [low, b])  # [batch, sequence, size]
    total = chain.add("Add", LORA_ADD, [y, delta])
    replace_uses(y, total, keep=[chain.last])
