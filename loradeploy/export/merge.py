"""Graph merge: an adapter folded into a graph's weights. No torch, no copy of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.errors import AdapterMismatchError, ExportError, listed
from loradeploy.export.find import Linear
from loradeploy.export.rewire import (
    add_constant,
    constant_of,
    free_name,
    remove_unused,
    set_constant,
    take_over,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_LISTED = 6
# What a weight passes through on its way to a product.
_CARRIERS = ("Cast", "Identity", "Transpose")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    `modules`: whose weights took the product of the factors in. `parameters`: replaced whole.
    `untied`: modules that shared their weight with others, and got a copy of their own.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    untied: tuple[str, ...]


def merge_adapter(
    model: ir.Model,
    linears: Mapping[str, Linear],
    adapter: Adapter,
    *,
    weights: Mapping[str, NDArray[Any]] | None = None,
) -> MergeReport:
    """W ← W + s · B A for every module of `adapter`, in float32 with one final cast.

    `weights` gives modules' weights [out, in] at a higher precision than the graph's, to start
    from. A weight that something else in the graph shares, such as an embedding tied to the output
    head, is copied first: the other user keeps its own.

    Raises:
        AdapterMismatchError: the graph lacks a module, or a size differs; all are in the one error.
        ExportError: a weight is quantised, or the result does not fit into the graph's dtype.
    """
    _check(model.graph, linears, adapter)
    untied = []
    for module in adapter.modules:
        start = None if weights is None else weights.get(module)
        merged = _merged(linears[module], adapter.factors[module], adapter.scaling(module), start)
        if _replace_weight(model.graph, linears[module], merged):
            untied.append(module)
    for parameter, values in sorted(adapter.saved.items()):
        if _replace_parameter(model.graph, linears, parameter, values):
            untied.append(parameter.rpartition(".")[0])
    remove_unused(model.graph, inputs=False)
    return MergeReport(adapter.modules, tuple(sorted(adapter.saved)), tuple(untied))


def _merged(
    linear: Linear, factors: Factors, scaling: float, start: NDArray[Any] | None
) -> NDArray[Any]:
    """The new weight, in the initializer's orientation and dtype."""
    held = constant_of(linear.weight)
    if start is not None:
        W = np.array(start if linear.transposed else start.T, dtype=np.float32)
    else:
        W = held.astype(np.float32)
    A, sB = factors.A.astype(np.float32), np.float32(scaling) * factors.B.astype(np.float32)
    if linear.transposed:
        W += sB @ A  # [out, in]
    else:
        W += A.T @ sB.T  # [in, out]
    return _cast(W, held.dtype, linear.module)


def _cast(values: NDArray[Any], dtype: np.dtype[Any], label: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(values, dtype=dtype)
    if dtype.itemsize < values.dtype.itemsize and not np.isfinite(cast).all():
        raise ExportError(
            f"{label}: the merged weight does not fit into {dtype}: export with --precision fp32"
        )
    return cast


def _replace_weight(graph: ir.Graph, linear: Linear, values: NDArray[Any]) -> bool:
    """Put `values` in the place of the linear's weight; whether it had to be untied."""
    if _users(linear.weight) <= set(linear.nodes):
        set_constant(linear.weight, values)
        return False
    # The copy is fed past whatever stands between the shared weight and the product.
    own: dict[bool, ir.Value] = {}
    for node in linear.nodes:
        turned = "transB" in node.attributes and bool(node.attributes["transB"].as_int())
        if turned not in own:
            oriented = values if turned == linear.transposed else np.ascontiguousarray(values.T)
            own[turned] = add_constant(graph, free_name(graph, f"{linear.module}.weight"), oriented)
        node.replace_input_with(1, own[turned])
    return True


def _replace_parameter(
    graph: ir.Graph, linears: Mapping[str, Linear], parameter: str, values: NDArray[Any]
) -> bool:
    """Put a parameter of modules_to_save in its place; whether it had to be untied."""
    module, _, part = parameter.rpartition(".")
    linear = linears.get(module)
    if linear is not None and part == "weight":
        turned = values if linear.transposed else values.T
        return _replace_weight(
            graph, linear, _cast(turned, constant_of(linear.weight).dtype, parameter)
        )
    if linear is not None and linear.bias is None:
        # A bias of zeros leaves no trace in a graph.
        _add_bias(graph, linear, values)
        return False
    value = graph.initializers[parameter] if linear is None else linear.bias
    if value is not None:
        set_constant(value, _cast(values, constant_of(value).dtype, parameter))
    return False


def _add_bias(graph: ir.Graph, linear: Linear, values: NDArray[Any]) -> None:
    import onnx_ir as ir

    name = f"{linear.module}.bias"
    bias = add_constant(
        graph, free_name(graph, name), _cast(values, constant_of(linear.weight).dtype, name)
    )
    for node in linear.nodes:
        product = node.outputs[0]
        add = ir.node("Add", [product, bias], name=f"{node.name or linear.module}/bias")
        add.outputs[0].name = add.name
        graph.insert_after(node, add)
        take_over(graph, product, add.outputs[0], keep=add)


def _check(graph: ir.Graph, linears: Mapping[str, Linear], adapter: Adapter) -> None:
    problems = []
    for module, pair in sorted(adapter.factors.items()):
        linear = linears.get(module)
        if linear is None:
            problems.append(f"{module} is no linear layer of the graph")
        elif (pair.A.shape[1], pair.B.shape[0]) != (linear.in_features, linear.out_features):
            problems.append(
                f"{module} is {linear.in_features} → {linear.out_features}, the adapter's factors"
                f" are for {pair.A.shape[1]} → {pair.B.shape[0]}"
            )
    for parameter, values in sorted(adapter.saved.items()):
        problems += _parameter_problem(graph, linears, parameter, values)
    if problems:
        raise AdapterMismatchError(
            f"the adapter does not fit this model: {listed(problems, _LISTED)}"
        )
    packed = [module for module in adapter.modules if linears[module].quantised]
    if packed:
        raise ExportError(
            f"{packed[0]} is already quantised, and merging into it would lose the adapter's"
            " detail: merge into the unquantised model and quantise the result"
        )


def _parameter_problem(
    graph: ir.Graph, linears: Mapping[str, Linear], parameter: str, values: NDArray[Any]
) -> list[str]:
    module, _, part = parameter.rpartition(".")
    linear = linears.get(module)
    shape: tuple[int, ...]
    if linear is not None and part == "weight":
        shape = (linear.out_features, linear.in_features)
    elif linear is not None and part == "bias":
        shape = (linear.out_features,)
    elif parameter in graph.initializers:
        value = graph.initializers[parameter]
        shape = tuple(constant_of(value).shape)
        if len(_users(value)) > 1:
            return [f"{parameter} (modules_to_save) is shared by several parts of the graph"]
    else:
        return [f"{parameter} (modules_to_save) is no weight of the graph"]
    if values.shape != shape:
        return [f"{parameter} is {list(values.shape)}, the base has {list(shape)}"]
    return []


def _users(value: ir.Value) -> set[ir.Node]:
    """The nodes that use `value`, seen through whatever only carries or turns it."""
    users: set[ir.Node] = set()
    for node, _ in value.uses():
        users |= _users(node.outputs[0]) if node.op_type in _CARRIERS else {node}
    return users
