"""Find a checkpoint's parameters in a graph, and replace their values.

A replaced constant that other nodes use too is not changed: the module gets a separate copy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import (
    add_constant,
    constant_of,
    free_name,
    replace_uses,
    set_constant,
)
from loradeploy.export.match.linears import Linear
from loradeploy.export.match.products import bias_use, input_of, output_of, value_of
from loradeploy.export.match.whole.biases import has_unclear_bias
from loradeploy.export.match.whole.layouts import is_conv1d
from loradeploy.export.match.whole.norm_forms import OTHER, PLUS_ONE, form_of
from loradeploy.export.match.whole.parts import Part

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

# Operators between a weight and its user.
_CARRIERS = ("Cast", "Identity", "Transpose")
# Parameters [in, out] by which modules multiply without a linear layer: Gemma 3's projector. In the
# graph they are the module's weight.
_MATRICES = ("mm_input_projection_weight",)


@dataclass(frozen=True, eq=False)
class Layers:
    """The layers of a graph by module."""

    graph: ir.Graph
    linears: Mapping[str, Linear]
    parts: Mapping[str, Part]

    def shape_of(self, parameter: str) -> tuple[int, ...] | None:
        """The shape of the checkpoint's `parameter`; None if the graph does not have it."""
        module, _, name = parameter.rpartition(".")
        linear, part = self.linears.get(module), self.parts.get(module)
        if linear is not None and name == "weight":
            shape = (linear.out_features, linear.in_features)
            return shape[::-1] if is_conv1d(linear) else shape
        if linear is not None and name == "bias":
            return (linear.out_features,)
        if linear is not None and name in _MATRICES:
            return (linear.in_features, linear.out_features)
        if part is not None and name == "weight":
            return part.shape
        if part is not None and name == "bias" and part.bias_input is not None:
            return (part.outputs,)
        value = self.graph.initializers.get(parameter)
        return None if value is None else tuple(constant_of(value).shape)

    def problem_with(self, parameter: str) -> str | None:
        """Why the checkpoint's `parameter` cannot be replaced in the graph; None if it can."""
        module, _, name = parameter.rpartition(".")
        value = self.graph.initializers.get(parameter)
        linear, part = self.linears.get(module), self.parts.get(module)
        if linear is not None and linear.slice is not None:
            return f"{parameter} is packed together with others and cannot be replaced separately"
        if linear is not None and linear.quantized and name != "bias":
            return f"{parameter} is quantized: merge into the unquantized model"
        if (
            linear is not None
            and name == "bias"
            and ((linear.bias is None and value is not None) or has_unclear_bias(linear))
        ):
            return f"{parameter} is used in a way that is not understood"
        if part is not None and name == "weight" and form_of(part) == OTHER:
            return f"{parameter} is in the graph in a form that is not the checkpoint's"
        plain = name not in ("weight", "bias") or (linear is None and part is None)
        if plain and value is not None and len(_users(value)) > 1:
            return f"{parameter} is shared by several parts of the graph"
        return None

    def replace(self, parameter: str, values: NDArray[Any]) -> bool:
        """Replace the checkpoint's `parameter` by `values`; return whether it had to be untied.

        Raises:
            ExportError: the values do not fit into the graph's dtype.
        """
        module, _, name = parameter.rpartition(".")
        linear, part = self.linears.get(module), self.parts.get(module)
        if linear is not None and name in _MATRICES:
            name, values = "weight", values.T
        if linear is not None and name == "weight":
            numbers = _in_graph(linear, values)
            return self.replace_weight(
                linear, cast(numbers, constant_of(linear.weight).dtype, parameter)
            )
        if linear is not None and name == "bias":
            self._replace_linear_bias(linear, values)
            return False
        if part is not None and name == "weight":
            if form_of(part) == PLUS_ONE:
                values = values.astype(np.float32) + 1
            return self.replace_weight(
                part, cast(values, constant_of(part.weight).dtype, parameter)
            )
        if part is not None and name == "bias":
            self._replace_part_bias(part, values)
            return False
        value = self.graph.initializers[parameter]
        set_constant(value, cast(values, constant_of(value).dtype, parameter))
        return False

    def add_to_bias(self, module: str, values: NDArray[np.float32]) -> None:
        """Add `values` [out] to the bias of `module`, or add a bias, at every call.

        Raises:
            ExportError: the sum does not fit into the graph's dtype.
        """
        linear = self.linears.get(module)
        use = None if linear is None else bias_use(linear.nodes[0], linear.out_features)
        found = self.parts[module].bias if linear is None else use and value_of(use)
        own = None if found is None else constant_of(found).reshape(-1)
        self.replace(f"{module}.bias", values if own is None else own.astype(np.float32) + values)

    def values_of(self, parameter: str) -> NDArray[Any]:
        """The unpacked weight `parameter` of the graph, in the layout of the checkpoint."""
        module, _, name = parameter.rpartition(".")
        layer = self._layer(module) if name == "weight" else None
        if layer is None:
            return constant_of(self.graph.initializers[parameter])
        return _in_graph(layer, constant_of(layer.weight))

    def overwrite(
        self, parameter: str, values: NDArray[Any], *, others: Collection[str] = ()
    ) -> None:
        """Replace the checkpoint's `parameter` by `values` for every user of the same constant.

        `others`: parameters that are overwritten too.

        Raises:
            ExportError: another layer has the same values in a separate constant, so that it is
                unknown whether they are tied; or the values do not fit into the dtype.
        """
        module, _, name = parameter.rpartition(".")
        layer = self._layer(module) if name == "weight" else None
        if layer is None or (isinstance(layer, Part) and layer.kind == "norm"):
            self.replace(parameter, values)  # in the graph's form, such as 1 + w
            return
        # An embedding may be tied to the head.
        twins: Mapping[str, Part | Linear]
        twins = self.linears if isinstance(layer, Part) else self.parts
        for other, twin in twins.items():
            named = f"{other}.weight"
            if twin.weight is not layer.weight and named not in others and self._same(twin, layer):
                raise ExportError(
                    f"{named} has the values of {parameter} in a separate constant: whether it"
                    " shares the adapter's weight is unknown; merge into the checkpoint"
                )
        numbers = _in_graph(layer, values)
        set_constant(layer.weight, cast(numbers, constant_of(layer.weight).dtype, parameter))

    def may_share(self, one: str, other: str) -> bool:
        """Whether two of the checkpoint's weights are one constant, or may be one."""
        modules = [name.removesuffix(".weight") for name in (one, other)]
        mine, theirs = map(self._layer, modules)
        if mine is None or theirs is None:
            return False
        return mine.weight is theirs.weight or self._same(mine, theirs)

    def _same(self, one: Linear | Part, other: Linear | Part) -> bool:
        """Whether two layers have the same weight; False if one is quantized or fused."""
        layers = (one, other)
        if any(isinstance(x, Linear) and (x.quantized or x.slice is not None) for x in layers):
            return False
        mine, theirs = (self.values_of(f"{x.module}.weight") for x in layers)
        return np.array_equal(mine, theirs)

    def _layer(self, module: str) -> Linear | Part | None:
        return self.linears.get(module) or self.parts.get(module)

    def replace_weight(self, layer: Linear | Part, values: NDArray[Any]) -> bool:
        """Replace the weight by `values`, in the graph's layout; return whether it was untied."""
        if not self.is_shared(layer):
            set_constant(layer.weight, values)
            return False
        self.untie(layer, values)
        return True

    def is_shared(self, layer: Linear | Part) -> bool:
        """Whether other layers or nodes use the weight of `layer` too."""
        return not _users(layer.weight) <= set(layer.nodes)

    def untie(self, layer: Linear | Part, values: NDArray[Any]) -> None:
        """Give `layer` a separate weight, `values` in the layout of the shared one."""
        # The copy bypasses the operators between the shared weight and its user.
        own: dict[bool, ir.Value] = {}
        for node in layer.nodes:
            transposed = isinstance(layer, Linear) and layer.transposed != _transposes(node)
            index = 1 if isinstance(layer, Linear) else layer.weight_input
            kind = None if (used := node.inputs[index]) is None else used.dtype
            if transposed not in own:
                oriented = np.ascontiguousarray(values.T) if transposed else values
                name = free_name(self.graph, f"{layer.module}.weight")
                if kind is not None and oriented.dtype != kind.numpy():
                    oriented = cast(oriented, kind.numpy(), name)  # as the bypassed Cast did
                own[transposed] = add_constant(self.graph, name, oriented)
            node.replace_input_with(index, own[transposed])

    def _replace_linear_bias(self, linear: Linear, values: NDArray[Any]) -> None:
        """Replace the bias of every call, or add it: a graph does not show biases of zeros."""
        import onnx_ir as ir

        own = self._own_bias(linear.module, values, _bias_dtype(linear))
        for node in linear.nodes:
            use = bias_use(node, linear.out_features)
            if use is not None:
                use[0].replace_input_with(use[1], self._shaped_as(use, own))
                continue
            product = output_of(node)
            add = ir.node("Add", [product, own], name=f"{node.name or linear.module}/bias")
            add.outputs[0].name = add.name
            self.graph.insert_after(product.producer() or node, add)
            replace_uses(product, add.outputs[0], keep=[add])

    def _replace_part_bias(self, part: Part, values: NDArray[Any]) -> None:
        assert part.bias_input is not None
        own = self._own_bias(part.module, values, constant_of(part.weight).dtype)
        for node in part.nodes:
            if len(node.inputs) <= part.bias_input:
                node.resize_inputs(part.bias_input + 1)
            node.replace_input_with(part.bias_input, own)

    def _shaped_as(self, use: tuple[ir.Node, int], own: ir.Value) -> ir.Value:
        """The bias `own` [out] with the axes of the one in use, so that the sum keeps its rank."""
        old = value_of(use)
        assert old is not None
        shape, numbers = constant_of(old).shape, constant_of(own)
        if shape == numbers.shape:
            return own
        return add_constant(
            self.graph, free_name(self.graph, str(own.name)), numbers.reshape(shape)
        )

    def _own_bias(self, module: str, values: NDArray[Any], dtype: np.dtype[Any]) -> ir.Value:
        name = f"{module}.bias"
        free = free_name(self.graph, f"{name}.new")
        return add_constant(self.graph, free, cast(values, dtype, name))


def _in_graph(layer: Linear | Part, values: NDArray[Any]) -> NDArray[Any]:
    """The checkpoint's weight in the layout of the graph; the same function converts it back."""
    if isinstance(layer, Part) or layer.transposed != is_conv1d(layer):
        return values
    turned: NDArray[Any] = values.T
    return turned


def _bias_dtype(linear: Linear) -> np.dtype[Any]:
    """The dtype in which a bias is added to the linear's product."""
    if linear.bias is not None:
        return constant_of(linear.bias).dtype
    if not linear.quantized:
        return constant_of(linear.weight).dtype
    # A packed weight has no float dtype, but the input, the scales and the output have.
    node = linear.nodes[0]
    values = [input_of(node), *node.inputs[2:3], output_of(node)]
    kinds = (v.dtype for v in values if v is not None and v.dtype is not None)
    floats = (kind.numpy() for kind in kinds if kind.is_floating_point())
    return next(floats, np.dtype(np.float32))


def cast(values: NDArray[Any], dtype: np.dtype[Any], label: str) -> NDArray[Any]:
    """`values` in `dtype`, contiguous.

    Raises:
        ExportError: a value is too large for the dtype.
    """
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(values, dtype=dtype)
    if dtype.itemsize < values.dtype.itemsize and not np.isfinite(narrow).all():
        raise ExportError(
            f"{label}: the merged weight does not fit into {dtype}: export with `precision='fp32'`"
        )
    return narrow


def _users(value: ir.Value) -> set[ir.Node]:
    """The nodes that use `value`, directly or through operators that cast or transpose it."""
    users: set[ir.Node] = set()
    for node, _ in value.uses():
        users |= _users(node.outputs[0]) if node.op_type in _CARRIERS else {node}
    return users


def _transposes(node: ir.Node) -> bool:
    return "transB" in node.attributes and bool(node.attributes["transB"].as_int())
