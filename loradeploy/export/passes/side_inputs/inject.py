"""Add low-rank factors to a graph as side inputs, and remove them again.

Per target module M, y = x W becomes

    y = x W + (x A[adapter_ids]) B[adapter_ids]

with `M.lora_A` [adapters, in, rank], `M.lora_B` [adapters, rank, out] and `adapter_ids` [batch] or
[1]. All are initializers that are also inputs. The default factors have rank 0, so that the graph
computes the base model if none are fed. Embeddings (embeddings.py) and outputs that DoRA and
trained biases change (output_scale.py) have other side inputs; those of heads replace the weights
instead of adding to them (heads.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loradeploy.bundle.manifest import AddedTokens, LoraTarget, Manifest, OutputTarget, SavedTarget
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import (
    Chain,
    free_constants,
    only_user,
    remove_optional_input,
    remove_unused,
    replace_uses,
)
from loradeploy.export.graph.names import (
    LORA_A_GATHER,
    LORA_A_MATMUL,
    LORA_ADD,
    LORA_B_GATHER,
    LORA_B_MATMUL,
    call_label,
    step_name,
)
from loradeploy.export.match.experts import Experts
from loradeploy.export.match.linears import Linear
from loradeploy.export.match.products import input_of, output_of, repeated_for_rows
from loradeploy.export.match.whole.parts import Part
from loradeploy.export.passes.fuse import (
    Fused,
    came_fused,
    fuse_products,
    products_of,
    separate_products,
)
from loradeploy.export.passes.side_inputs.embeddings import add_embedding_factors
from loradeploy.export.passes.side_inputs.experts import add_expert_factors
from loradeploy.export.passes.side_inputs.heads import replace_head, restore_head
from loradeploy.export.passes.side_inputs.hidden_tokens import hide_tokens
from loradeploy.export.passes.side_inputs.output_scale import (
    Change,
    change_output,
    undo_output_scale,
)
from loradeploy.export.passes.side_inputs.rows import Rows, rows_of
from loradeploy.export.passes.side_inputs.surgery import Surgery

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

Arrays = Mapping[str, "NDArray[Any]"]


@dataclass(frozen=True, eq=False)
class SideInputs:
    """The side inputs that were added.

    `targets`, `saved`, `changed`: for the manifest. `defaults`: of the replaced parameters, by
    input name. `biases`: those in the outputs of `changed`, by parameter name in the base. `dtype`:
    numpy's name of the side inputs' dtype.
    """

    targets: tuple[LoraTarget, ...]
    saved: tuple[SavedTarget, ...]
    defaults: Mapping[str, NDArray[Any]]
    dtype: str
    changed: tuple[OutputTarget, ...] = ()
    biases: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def inject_side_inputs(
    model: ir.Model,
    targets: Sequence[Linear],
    heads: Sequence[Linear] = (),
    *,
    biased: Iterable[str] = (),
    embeddings: Sequence[Part] = (),
    experts: Sequence[Experts] = (),
    changes: Sequence[Change] = (),
    added: AddedTokens | None = None,
) -> SideInputs:
    """Add low-rank side inputs to `targets`, `embeddings` and `experts`; make `heads` side inputs.

    `biased`: heads with a bias in the checkpoint that the graph lacks because it is zero. The
    outputs of `changes` also get scales and offsets, and the logits get an offset that hides the
    `added` tokens which an adapter does not have.

    Raises:
        ExportError: a name is taken, or the rows of an input cannot be determined from the graph.
    """
    layers = [*targets, *heads, *(c.layer for c in changes if isinstance(c.layer, Linear))]
    surgery = Surgery(model.graph, _factor_type(layers))
    biases = {c.layer.module: bias for c in changes if (bias := c.bias()) is not None}
    # First, so that the updates that are added to products later are scaled too.
    changed = tuple(change_output(surgery, change) for change in changes)
    with_bias = set(biased)
    saved = [
        target
        for linear in heads
        for target in replace_head(surgery, linear, with_bias=linear.module in with_bias)
    ]
    apart = {change.layer.module for change in changes}
    products = fuse_products(model.graph, targets, apart=apart)
    for product in products:
        _add_factors(surgery, product)
    lora = [member.target() for product in products for member in product.members]
    lora += [add_embedding_factors(surgery, part) for part in embeddings]
    lora += [add_expert_factors(surgery, each) for each in experts]
    if added is not None and added.output is not None:
        changed = (*changed, hide_tokens(surgery, added))
    remove_unused(model.graph)
    return SideInputs(
        targets=tuple(lora),
        saved=tuple(saved),
        defaults=surgery.defaults,
        dtype=surgery.dtype.numpy().name,
        changed=changed,
        biases={f"{module}.bias": bias for module, bias in biases.items()},
    )


def remove_side_inputs(model: ir.Model, manifest: Manifest) -> None:
    """Undo `inject_side_inputs`: the graph computes the base model and has no side inputs.

    Raises:
        ExportError: the graph does not have the nodes for the manifest's side inputs.
    """
    nodes = {str(node.name): node for node in model.graph}
    for label in _updated(manifest.targets):
        call = 0
        while (add := nodes.get(step_name(call_label(label, call), LORA_ADD))) is not None:
            base = add.inputs[0]
            if base is not None:
                replace_uses(add.outputs[0], base)
            call += 1
        if call == 0:
            raise ExportError(f"the graph has no side input at {label}: it was changed")
    for output in manifest.changed:
        if not undo_output_scale(output.module, nodes):
            raise ExportError(f"the graph has no side input at {output.module}: it was changed")
    for saved in manifest.saved:
        head, _, part = saved.parameter.rpartition(".")
        if part == "weight":
            restore_head(model.graph, head, nodes, conv1d=not saved.transposed)
    apart = separate_products(model.graph, manifest.targets)
    remove_unused(model.graph)
    free_constants(model.graph, apart)
    _remove_unused_inputs(model.graph)


def _remove_unused_inputs(graph: ir.Graph) -> None:
    """Remove the inputs that have a default and are no longer used."""
    for value in list(graph.inputs):
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            remove_optional_input(graph, str(value.name))


def _updated(targets: Iterable[LoraTarget]) -> Iterator[str]:
    """The labels of added updates: each module, or the whole of a product that came fused."""
    for label, members in products_of(targets):
        if came_fused(label, members):
            yield label
        else:
            yield from (member.module for member in members)


def _add_factors(surgery: Surgery, product: Fused) -> None:
    """y = x W → y = x W + (x A) B, at every call of the product, with factors for each member."""
    factors = [
        surgery.factors(member.module, member.in_features, member.out_features)
        for member in product.members
    ]
    for call in range(len(product.members[0].nodes)):
        _add_factors_at(surgery, product, call, factors)


def _add_factors_at(
    surgery: Surgery, product: Fused, call: int, factors: Sequence[tuple[ir.Value, ir.Value]]
) -> None:
    node, label = product.members[0].nodes[call], call_label(product.label, call)
    rows = rows_of(surgery.graph, node, product.label)
    outputs = product.outputs or (output_of(node),)
    x = rows.x
    dtype = surgery.dtype if x.dtype is None else x.dtype
    chain = surgery.chain(outputs[0].producer() or node, label, dtype)
    if rows.no_sequence:
        x = chain.add("Unsqueeze", "lora_unsqueeze", [x, surgery.sequence_axis])  # [batch, 1, in]
    into = product.members[0].in_features
    x = rows.front(surgery, chain, x, into, "lora_unflatten")  # [batch, sequence, in]
    labels = [call_label(member.module, call) for member in product.members]
    updates = []
    for own, (A, B) in zip(labels, factors, strict=True):
        chain.label = own
        a = chain.add("Gather", LORA_A_GATHER, [A, surgery.ids], axis=0)  # [rows, in, rank]
        b = chain.add("Gather", LORA_B_GATHER, [B, surgery.ids], axis=0)  # [rows, rank, out]
        if dtype is not surgery.dtype:
            a.dtype = b.dtype = surgery.dtype
            a, b = (
                chain.add("Cast", f"lora_{name}_cast", [factor], to=int(dtype))
                for name, factor in (("A", a), ("B", b))
            )
        low = chain.add("MatMul", LORA_A_MATMUL, [x, a])  # [batch, sequence, rank]
        updates.append(chain.add("MatMul", LORA_B_MATMUL, [low, b]))  # [batch, sequence, out]
    sizes = [member.out_features for member in product.members]
    if len(outputs) < len(updates):  # came fused: the next node uses the output of all members
        chain.label = label
        updates = [chain.add("Concat", "lora_concat", updates, axis=-1)]
        labels, sizes = [label], [sum(sizes)]
    for own, y, update, size in zip(labels, outputs, updates, sizes, strict=True):
        chain.label = own
        _add(surgery, chain, rows, y, update, size)


def _add(
    surgery: Surgery, chain: Chain, rows: Rows, y: ir.Value, update: ir.Value, size: int
) -> None:
    """Replace `y` for its users by y + `update`, which is [batch, sequence, size]."""
    if rows.no_sequence:
        update = chain.add("Squeeze", "lora_squeeze", [update, surgery.sequence_axis])
    update = rows.back(surgery, chain, update, y, size, "lora_flatten")
    total = chain.add("Add", LORA_ADD, [y, update])
    replace_uses(y, total, keep={chain.last, *chain.readers})
    if rows.repeated:
        _forget_shapes(total)


def _forget_shapes(total: ir.Value) -> None:
    """Remove the shapes that are declared for `total` plus constants: those of a single row.

    onnxruntime fails where an output does not fit into the memory that it planned for its shape.
    """
    repeated = repeated_for_rows(total)
    node = only_user(total)
    while node is not None and (value := node.outputs[0]) is not repeated:
        value.shape = None
        node = only_user(value)


def _factor_type(linears: Sequence[Linear]) -> ir.DataType:
    """The dtype of the factors: float16 if there are products in float16, otherwise float32.

    In products in float32 of a graph in float16, such as T5's `wo`, the factors are cast.
    """
    import onnx_ir as ir

    found = set()
    for node in (node for linear in linears for node in linear.nodes):
        values = (input_of(node), output_of(node))
        types = {value.dtype for value in values if value is not None and value.dtype is not None}
        if len(types) > 1 or not types <= {ir.DataType.FLOAT, ir.DataType.FLOAT16}:
            listed = ", ".join(sorted(dtype.name for dtype in types))
            raise ExportError(
                f"a linear layer computes in {listed}: give the graph in float32 or float16"
            )
        found |= types
    return ir.DataType.FLOAT16 if ir.DataType.FLOAT16 in found else ir.DataType.FLOAT
