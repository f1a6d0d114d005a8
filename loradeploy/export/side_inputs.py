"""Graph surgery: low-rank factors and heads become inputs of the graph, and are taken out again.

Per target module M, y = x W becomes

    y = x W + (x A[adapter_ids]) B[adapter_ids]

with `M.lora_A` [adapters, in, rank], `M.lora_B` [adapters, rank, out] and `adapter_ids` [batch] or
[1]. All are initializers that are also inputs: left out, their defaults hold, which have rank 0, so
that the graph computes the base model. A head's `M.weight` [adapters, in, out] and `M.bias`
[adapters, out] are replaced instead of added to; their defaults are the base's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loradeploy.bundle.manifest import LoraTarget, Manifest, SavedTarget
from loradeploy.bundle.names import ADAPTER_IDS, lora_a_name, lora_b_name
from loradeploy.errors import ExportError
from loradeploy.export.find import Linear

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class SideInputs:
    """What surgery added: targets and heads for the manifest, and the heads' defaults by input."""

    targets: tuple[LoraTarget, ...]
    saved: tuple[SavedTarget, ...]
    defaults: Mapping[str, NDArray[Any]]
    dtype: str


def inject_side_inputs(
    model: ir.Model,
    targets: Sequence[Linear],
    heads: Sequence[Linear] = (),
    *,
    biased: Iterable[str] = (),
) -> SideInputs:
    """Give every linear in `targets` low-rank side inputs and replace those in `heads` by inputs.

    `biased` names heads with a bias in the checkpoint that the graph lacks because it is zero.

    Raises:
        ExportError: a name is taken, or the rows of an input cannot be told from the graph.
    """
    import onnx_ir as ir

    graph = model.graph
    names = {value.name for value in graph.inputs}
    if ADAPTER_IDS in names:
        raise ExportError(f"the graph already has an input named {ADAPTER_IDS}")
    dtype = _factor_type([*targets, *heads])
    surgery = _Surgery(graph, dtype)
    lora = tuple(surgery.add_factors(linear) for linear in targets)
    saved: list[SavedTarget] = []
    with_bias = set(biased)
    for linear in heads:
        saved += surgery.replace_head(linear, with_bias=linear.module in with_bias)
    _remove_unused(graph, keep_inputs=True)
    return SideInputs(lora, tuple(saved), surgery.defaults, dtype=ir.DataType(dtype).numpy().name)


class _Surgery:
    """The graph under the knife: its `adapter_ids`, and the defaults of what was replaced."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        import numpy as np

        self.graph = graph
        self.dtype = dtype
        self.defaults: dict[str, NDArray[Any]] = {}
        self.ids = self._side_input(ADAPTER_IDS, ["rows"], np.zeros(1, np.int64))
        self._axes: dict[int, ir.Value] = {}

    def add_factors(self, linear: Linear) -> LoraTarget:
        """y = x W → y = x W + (x A) B, at every call of the module."""
        import numpy as np

        module, into, out = linear.module, linear.in_features, linear.out_features
        dtype = self.dtype.numpy()
        A = self._side_input(
            lora_a_name(module), ["adapters", into, "rank"], np.zeros((1, into, 0), dtype)
        )
        B = self._side_input(
            lora_b_name(module), ["adapters", "rank", out], np.zeros((1, 0, out), dtype)
        )
        for call, node in enumerate(linear.nodes):
            self._add_factors_at(node, f"{module}/{call}" if call else module, A, B)
        return LoraTarget(
            module=module,
            in_features=into,
            out_features=out,
            lora_A=str(A.name),
            lora_B=str(B.name),
            weight=str(linear.weight.name),
            transposed=linear.transposed,
            found_by=linear.found_by,
        )

    def _add_factors_at(self, node: ir.Node, label: str, A: ir.Value, B: ir.Value) -> None:
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None
        rank = _rank(node, label)
        at: ir.Node = node

        def then(op: str, name: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
            nonlocal at
            at = self._insert_after(at, op, f"{label}/{name}", inputs, attributes)
            return at.outputs[0]

        a = then("Gather", "lora_A_gather", [A, self.ids], axis=0)  # [rows, in, rank]
        b = then("Gather", "lora_B_gather", [B, self.ids], axis=0)  # [rows, rank, out]
        if rank == 2:
            x = then("Unsqueeze", "lora_unsqueeze", [x, self._axis(1)])  # [batch, 1, in]
        low = then("MatMul", "lora_A_matmul", [x, a])  # [batch, sequence, rank]
        delta = then("MatMul", "lora_B_matmul", [low, b])  # [batch, sequence, out]
        if rank == 2:
            delta = then("Squeeze", "lora_squeeze", [delta, self._axis(1)])
        total = then("Add", "lora_add", [y, delta])
        _take_over(self.graph, y, total, keep=at)

    def replace_head(self, linear: Linear, *, with_bias: bool) -> list[SavedTarget]:
        """y = x W + b → y = x W[adapter_ids] + b[adapter_ids]."""
        import numpy as np

        module = linear.module
        if len(linear.nodes) != 1 or linear.quantised:
            raise ExportError(f"the head {module} is used in a way that cannot be a side input")
        node = linear.nodes[0]
        held = _constant(linear.weight)
        weight = np.ascontiguousarray(held.T if linear.transposed else held)[np.newaxis]
        last = _last_of(linear)
        bias = None if linear.bias is None else _constant(linear.bias)[np.newaxis]
        if bias is None and with_bias:
            bias = np.zeros((1, linear.out_features), weight.dtype)
        x, y = node.inputs[0], last.outputs[0]
        assert x is not None
        rank = _rank(node, module)
        _forget(self.graph, linear.weight, node)
        W = self._side_input(f"{module}.weight", ["adapters", *weight.shape[1:]], weight)
        self.defaults[str(W.name)] = weight
        saved = [
            SavedTarget(
                parameter=f"{module}.weight",
                input=str(W.name),
                shape=(linear.out_features, linear.in_features),
                transposed=True,
            )
        ]
        at: ir.Node = last

        def then(op: str, name: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
            nonlocal at
            at = self._insert_after(at, op, f"{module}/{name}", inputs, attributes)
            return at.outputs[0]

        w = then("Gather", "head_weight_gather", [W, self.ids], axis=0)  # [rows, in, out]
        if rank == 2:
            x = then("Unsqueeze", "head_unsqueeze", [x, self._axis(1)])  # [batch, 1, in]
        result = then("MatMul", "head_matmul", [x, w])  # [batch, sequence, out]
        if bias is not None:
            if linear.bias is not None:
                _forget(self.graph, linear.bias, last)
            b_input = self._side_input(f"{module}.bias", ["adapters", bias.shape[1]], bias)
            self.defaults[str(b_input.name)] = bias
            saved.append(
                SavedTarget(
                    parameter=f"{module}.bias",
                    input=str(b_input.name),
                    shape=(linear.out_features,),
                    transposed=False,
                )
            )
            b = then("Gather", "head_bias_gather", [b_input, self.ids], axis=0)  # [rows, out]
            b = then("Unsqueeze", "head_bias_unsqueeze", [b, self._axis(1)])  # [rows, 1, out]
            result = then("Add", "head_add", [result, b])
        if rank == 2:
            result = then("Squeeze", "head_squeeze", [result, self._axis(1)])
        _take_over(self.graph, y, result, keep=None)
        for dead in dict.fromkeys((last, node)):
            self.graph.remove(dead, safe=True)
        return saved

    def _side_input(self, name: str, shape: list[int | str], default: NDArray[Any]) -> ir.Value:
        import onnx_ir as ir

        if name in self.graph.initializers or any(v.name == name for v in self.graph.inputs):
            raise ExportError(f"the graph already has a value named {name}")
        tensor = ir.tensor(default, name=name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(shape),
            const_value=tensor,
        )
        self.graph.inputs.append(value)
        self.graph.register_initializer(value)
        return value

    def _axis(self, axis: int) -> ir.Value:
        import numpy as np
        import onnx_ir as ir

        if axis not in self._axes:
            name = f"side_input_axis_{axis}"
            tensor = ir.tensor(np.array([axis], np.int64), name=name)
            value = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=tensor.shape,
                const_value=tensor,
            )
            self.graph.register_initializer(value)
            self._axes[axis] = value
        return self._axes[axis]

    def _insert_after(
        self,
        node: ir.Node,
        op: str,
        name: str,
        inputs: list[ir.Value | None],
        attributes: Mapping[str, int],
    ) -> ir.Node:
        import onnx_ir as ir

        new = ir.node(op, inputs, attributes=dict(attributes), name=name)
        new.outputs[0].name = name
        new.outputs[0].dtype = self.dtype
        self.graph.insert_after(node, new)
        return new


def remove_side_inputs(model: ir.Model, manifest: Manifest) -> None:
    """Undo `inject_side_inputs`: the graph computes the base model and takes no side inputs.

    Raises:
        ExportError: the graph does not have the nodes that the manifest tells of.
    """
    nodes = {node.name: node for node in model.graph if node.name}
    for target in manifest.targets:
        call = 0
        while (add := nodes.get(f"{_label(target.module, call)}/lora_add")) is not None:
            base, total = add.inputs[0], add.outputs[0]
            assert base is not None
            _take_over(model.graph, total, base, keep=None)
            call += 1
        if call == 0:
            raise ExportError(f"the graph has no side input at {target.module}: it was changed")
    _restore_heads(model, manifest, nodes)
    _remove_unused(model.graph, keep_inputs=False)


def _restore_heads(model: ir.Model, manifest: Manifest, nodes: Mapping[str, ir.Node]) -> None:
    import numpy as np
    import onnx_ir as ir

    graph = model.graph
    modules = dict.fromkeys(saved.parameter.rpartition(".")[0] for saved in manifest.saved)
    for module in modules:
        product = nodes.get(f"{module}/head_matmul")
        if product is None:
            raise ExportError(f"the graph has no side input at {module}: it was changed")
        unsqueeze = nodes.get(f"{module}/head_unsqueeze")
        add, squeeze = nodes.get(f"{module}/head_add"), nodes.get(f"{module}/head_squeeze")
        x = (unsqueeze or product).inputs[0]
        last = squeeze or add or product
        result = last.outputs[0]
        scopes = {"pkg.torch.onnx.name_scopes": str(["", module, "linear"])}
        held = {
            part: graph.initializers[f"{module}.{part}"]
            for part in ("weight", "bias")
            if f"{module}.{part}" in graph.initializers
        }
        made: list[ir.Value] = []
        for part, value in held.items():
            constant = np.ascontiguousarray(_constant(value)[0])
            name = f"{module}.{part}"
            for index, other in enumerate(graph.inputs):
                if other is value:
                    del graph.inputs[index]
                    break
            value.name = f"{name}.side_input"
            graph.initializers.pop(name)
            tensor = ir.tensor(constant, name=name)
            new = ir.Value(name=name, type=value.type, shape=tensor.shape, const_value=tensor)
            graph.register_initializer(new)
            made.append(new)
        matmul = ir.node("MatMul", [x, made[0]], name=f"{module}/MatMul", metadata_props=scopes)
        matmul.outputs[0].name = f"{module}/MatMul"
        matmul.outputs[0].dtype = made[0].dtype
        new_nodes = [matmul]
        if len(made) == 2:
            plus = ir.node(
                "Add", [matmul.outputs[0], made[1]], name=f"{module}/Add", metadata_props=scopes
            )
            plus.outputs[0].name = f"{module}/Add"
            plus.outputs[0].dtype = made[0].dtype
            new_nodes.append(plus)
        graph.insert_after(last, new_nodes)
        _take_over(graph, result, new_nodes[-1].outputs[0], keep=None)


def _remove_unused(graph: ir.Graph, *, keep_inputs: bool) -> None:
    """Drop the nodes and initializers, and optional inputs, that nothing uses any more."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    unused = {
        value
        for value in graph.initializers.values()
        if not value.uses() and value not in outputs
        if not (keep_inputs and value.is_graph_input())
    }
    for index in reversed(range(len(graph.inputs))):
        if graph.inputs[index] in unused:
            del graph.inputs[index]
    for value in unused:
        graph.initializers.pop(str(value.name))


def _label(module: str, call: int) -> str:
    return f"{module}/{call}" if call else module


def _take_over(graph: ir.Graph, old: ir.Value, new: ir.Value, *, keep: ir.Node | None) -> None:
    """Let every user of `old` but `keep` use `new`, the graph's output included, name and all."""
    for node, index in list(old.uses()):
        if node is not keep:
            node.replace_input_with(index, new)
    new.type, new.shape = old.type, old.shape
    for index, output in enumerate(graph.outputs):
        if output is old:
            name = old.name
            old.name = f"{name}/without_side_inputs" if keep is not None else f"{name}/replaced"
            new.name = name
            graph.outputs[index] = new


def _forget(graph: ir.Graph, constant: ir.Value, user: ir.Node) -> None:
    """Drop the initializer `constant` if `user` is all that uses it, or free its name."""
    name = str(constant.name)
    if all(node is user for node, _ in constant.uses()):
        graph.initializers.pop(name)
        constant.name = f"{name}/replaced"
        return
    graph.initializers.pop(name)
    constant.name = f"{name}/shared"
    graph.register_initializer(constant)


def _last_of(linear: Linear) -> ir.Node:
    """The node that gives the linear's result: its product, or the addition of its bias."""
    node = linear.nodes[0]
    if linear.bias is None or node.op_type == "Gemm":
        return node
    return next(iter(node.outputs[0].uses())).node


def _rank(node: ir.Node, label: str) -> int:
    """2 where x is [batch, in], 3 where it is [batch, sequence, in]."""
    x, y = node.inputs[0], node.outputs[0]
    shape = x.shape if x is not None and x.shape is not None else y.shape
    if shape is None:
        raise ExportError(f"the graph does not tell the shape of {label}'s input")
    if len(shape) not in (2, 3):
        raise ExportError(
            f"{label} takes an input of rank {len(shape)}, whose rows cannot have adapters of their"
            " own: merge the adapter instead"
        )
    return len(shape)


def _factor_type(linears: Sequence[Linear]) -> ir.DataType:
    """The dtype of the products' inputs, which is that of the factors."""
    import onnx_ir as ir

    types = {
        value.dtype
        for linear in linears
        for node in linear.nodes
        for value in (node.inputs[0], node.outputs[0])
        if value is not None and value.dtype is not None
    }
    if not types:
        return ir.DataType.FLOAT
    if len(types) > 1 or next(iter(types)) not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        listed = ", ".join(sorted(dtype.name for dtype in types))
        raise ExportError(
            f"the linear layers compute in {listed}: side inputs are float32 or float16"
        )
    return next(iter(types))


def _constant(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()
