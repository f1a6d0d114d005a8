"""LoRA on the experts of a mixture as side inputs.

y [experts, tokens, out] = x W becomes, with tokens split into batch and sequence,

    y + (x A[adapter_ids]) B[adapter_ids]

`M.lora_A` [adapters, in, rank · experts] and `M.lora_B` [adapters, rank · experts, out] have the
entries of all experts, ordered by rank, then by expert: zeros after them make a higher rank.
"""

from __future__ import annotations

from loradeploy.bundle.manifest import LoraTarget
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import replace_uses
from loradeploy.export.graph.names import LORA_ADD, call_label
from loradeploy.export.match.experts import Experts
from loradeploy.export.passes.side_inputs.surgery import Surgery


def add_expert_factors(surgery: Surgery, experts: Experts) -> LoraTarget:
    """y = x W → y = x W + (x A) B, of every expert.

    Raises:
        ExportError: the graph does not specify the shape of x.
    """
    import onnx_ir as ir

    node, name = experts.node, experts.parameter
    x, y = node.inputs[0], node.outputs[0]
    count, into, out = experts.shape
    first = None if x is None or x.shape is None else x.shape[0]
    if x is None or not isinstance(first, int) or first not in (1, count):
        raise ExportError(
            f"{name}: the graph does not specify the shape of its input: merge instead"
        )
    A, B = surgery.factors(name, into, out)
    sizes = surgery.chain(node, call_label(name, 0), ir.DataType.INT64)
    front = surgery.integers(f"experts_{first}", [first])
    apart = sizes.add("Concat", "lora_rows", [front, surgery.unflattened(into)], axis=0)
    chain = surgery.chain(sizes.last, call_label(name, 0))
    x = chain.add("Reshape", "lora_unflatten", [x, apart])  # [1 or experts, batch, sequence, in]
    a = chain.add("Gather", "lora_A_gather", [A, surgery.ids], axis=0)  # [rows, in, rank·experts]
    b = chain.add("Gather", "lora_B_gather", [B, surgery.ids], axis=0)  # [rows, rank·experts, out]
    of_a = surgery.integers(f"lora_A_experts_{count}_{into}", [0, into, -1, count])
    of_b = surgery.integers(f"lora_B_experts_{count}_{out}", [0, -1, count, out])
    a = chain.add("Reshape", "lora_A_reshape", [a, of_a])  # [rows, in, rank, experts]
    b = chain.add("Reshape", "lora_B_reshape", [b, of_b])  # [rows, rank, experts, out]
    a = chain.add("Transpose", "lora_A_transpose", [a], perm=[3, 0, 1, 2])
    b = chain.add("Transpose", "lora_B_transpose", [b], perm=[2, 0, 1, 3])
    low = chain.add("MatMul", "lora_A_matmul", [x, a])  # [experts, batch, sequence, rank]
    update = chain.add("MatMul", "lora_B_matmul", [low, b])  # [experts, batch, sequence, out]
    flat = surgery.integers(f"flat_experts_{count}_{out}", [count, -1, out])
    update = chain.add("Reshape", "lora_flatten", [update, flat])  # [experts, tokens, out]
    total = chain.add("Add", LORA_ADD, [y, update])
    replace_uses(y, total, keep=[chain.last])
    return experts.target()
