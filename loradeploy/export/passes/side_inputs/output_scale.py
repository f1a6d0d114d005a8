"""Scale and shift outputs by side inputs: y becomes scale[adapter_ids] ⊙ y + offset[adapter_ids].

`M.scale` and `M.offset` [adapters, out] default to ones and zeros. They are applied after the
layer's bias if the graph adds a known one, else directly after its product; see
`bundle.adapter_inputs.changes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.manifest import OutputTarget
from loradeploy.bundle.names import offset_name, scale_name
from loradeploy.export.graph.edit import constant_of, replace_uses
from loradeploy.export.graph.names import (
    OFFSET_ADD,
    SCALE_BACK,
    SCALE_FRONT,
    SCALE_MUL,
    call_label,
    step_name,
)
from loradeploy.export.match.linears import Linear
from loradeploy.export.match.products import bias_use
from loradeploy.export.match.whole.parts import Part
from loradeploy.export.passes.side_inputs.rows import Rows, rows_of, rows_of_output
from loradeploy.export.passes.side_inputs.surgery import Surgery

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_FIRST: Final = (SCALE_FRONT, SCALE_MUL, OFFSET_ADD)
_LAST: Final = (SCALE_BACK, OFFSET_ADD, SCALE_MUL)


@dataclass(frozen=True, eq=False)
class Change:
    """A layer whose output gets a scale, an offset, or both."""

    layer: Linear | Part
    scale: bool
    offset: bool

    @property
    def size(self) -> int:
        """The number of features of the output."""
        return self.layer.out_features if isinstance(self.layer, Linear) else self.layer.outputs

    def ends(self) -> Sequence[tuple[ir.Node, ir.Node]]:
        """The node of each call, and the node that computes its result, bias included."""
        if isinstance(self.layer, Part):
            return [(node, node) for node in self.layer.nodes]
        uses = [bias_use(node, self.size) for node in self.layer.nodes]
        return [
            (node, node if use is None else use[0])
            for node, use in zip(self.layer.nodes, uses, strict=True)
        ]

    def bias(self) -> NDArray[np.float32] | None:
        """The bias that is in the output."""
        bias = self.layer.bias
        return None if bias is None else constant_of(bias).astype(np.float32).reshape(-1)


def change_output(surgery: Surgery, change: Change) -> OutputTarget:
    """Add side inputs that scale and shift the output of every call of the layer.

    Raises:
        ExportError: the rows of the output cannot be determined from the graph.
    """
    module, size = change.layer.module, change.size
    dtype = surgery.dtype.numpy()
    inputs: dict[str, ir.Value] = {}
    if change.scale:
        default = np.ones((1, size), dtype)
        inputs["scale"] = surgery.side_input(scale_name(module), ["adapters", size], default)
    if change.offset:
        default = np.zeros((1, size), dtype)
        inputs["offset"] = surgery.side_input(offset_name(module), ["adapters", size], default)
    for call, (node, end) in enumerate(change.ends()):
        if isinstance(change.layer, Part) and change.layer.kind == "embedding":
            rows = rows_of_output(surgery.graph, node.outputs[0], module)
        else:
            rows = rows_of(surgery.graph, node, module)
        _change_at(surgery, call_label(module, call), end, rows, size, inputs)
    return OutputTarget(
        module=module,
        size=size,
        scale=scale_name(module) if change.scale else None,
        offset=offset_name(module) if change.offset else None,
    )


def undo_output_scale(module: str, nodes: Mapping[str, ir.Node]) -> bool:
    """Undo `change_output`; return whether there was anything to undo."""
    call = 0
    while (last := _last(nodes, label := call_label(module, call))) is not None:
        first = next(
            node for name in _FIRST if (node := nodes.get(step_name(label, name))) is not None
        )
        base = first.inputs[0]
        assert base is not None
        replace_uses(last.outputs[0], base)
        call += 1
    return call > 0


def _change_at(
    surgery: Surgery,
    label: str,
    end: ir.Node,
    rows: Rows,
    size: int,
    inputs: Mapping[str, ir.Value],
) -> None:
    old = end.outputs[0]
    dtype = surgery.dtype if old.dtype is None else old.dtype
    chain = surgery.chain(end, label, dtype)
    y = old
    first = None
    if rows.moved:
        y = rows.front(surgery, chain, y, size, SCALE_FRONT)  # [batch, sequence, out]
        first = chain.last
    for name, op, step in (("scale", "Mul", SCALE_MUL), ("offset", "Add", OFFSET_ADD)):
        if name not in inputs:
            continue
        value = chain.add("Gather", f"{name}_gather", [inputs[name], surgery.ids], axis=0)
        if dtype is not surgery.dtype:  # see inject._factor_type
            value.dtype = surgery.dtype
            value = chain.add("Cast", f"{name}_cast", [value], to=int(dtype))
        if not rows.no_sequence:
            value = chain.add("Unsqueeze", f"{name}_unsqueeze", [value, surgery.sequence_axis])
        y = chain.add(op, step, [y, value])  # [batch, (sequence,) out]
        first = first or chain.last
    y = rows.back(surgery, chain, y, old, size, SCALE_BACK)
    assert first is not None
    replace_uses(old, y, keep={first, *chain.readers})


def _last(nodes: Mapping[str, ir.Node], label: str) -> ir.Node | None:
    return next((node for name in _LAST if (node := nodes.get(step_name(label, name)))), None)
