"""Graph merge: an adapter folded into a graph's weights. No torch, no copies of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.errors import AdapterMismatchError, ExportError
from loradeploy.export.find import Linear

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_LISTED = 6


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    `modules`: whose weights took the product of factors in; `parameters`: replaced whole.
    `untied`: modules whose weight other parts of the graph share, and which got a copy of their own.
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
    _check(model, linears, adapter)
    untied = []
    for module in adapter.modules:
        linear = linears[module]
        base = None if weights is None else weights.get(module)
        merged = _merged(linear, adapter.factors[module], adapter.scaling(module), base)
        if _replace_weight(model.graph, linear, merged):
            untied.append(module)
    for parameter, values in sorted(adapter.saved.items()):
        if _replace_parameter(model.graph, linears, parameter, values):
            untied.append(parameter.rpartition(".")[0])
    return MergeReport(adapter.modules, tuple(sorted(adapter.saved)), tuple(untied))


def _merged(
    linear: Linear, factors: Factors, scaling: float, base: NDArray[Any] | None
) -> NDArray[Any]:
    """The new weight, in the initializer's orientation and dtype."""
    held = _constant(linear.weight)
    if base is not None:
        start = base if linear.transposed else base.T
    else:
        start = held
    W = start.astype(np.float32)
    A, B = factors.A.astype(np.float32), factors.B.astype(np.float32)
    if linear.transposed:
        W += np.float32(scaling) * (B @ A)  # [out, in]
    else:
        W += np.float32(scaling) * (A.T @ B.T)  # [in, out]
    return _cast(W, held.dtype, linear.module)


def _cast(values: NDArray[Any], dtype: np.dtype[Any], label: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(values, dtype=dtype)
    if not np.isfinite(cast.astype(np.float32, copy=False)).all():
        raise ExportError(
            f"{label}: the merged weight does not fit into {dtype}: export with --precision fp32"
        )
    return cast


def _replace_weight(graph: ir.Graph, linear: Linear, values: NDArray[Any]) -> bool:
    """Put `values` in the place of the linear's weight; whether it had to be untied."""
    import onnx_ir as ir

    weight = linear.weight
    if _users(weight) <= set(linear.nodes):
        weight.const_value = ir.tensor(values, name=weight.name)
        return False
    # The copy is fed past whatever stood between the shared weight and the product.
    new = _initializer(graph, f"{linear.module}.weight", values)
    for node in linear.nodes:
        turned = node.op_type == "Gemm" and bool(node.attributes["transB"].as_int())
        if turned != linear.transposed:
            new = _initializer(graph, f"{linear.module}.weight", np.ascontiguousarray(values.T))
        node.replace_input_with(1, new)
    return True


def _replace_parameter(
    graph: ir.Graph, linears: Mapping[str, Linear], parameter: str, values: NDArray[Any]
) -> bool:
    """Put a parameter of modules_to_save in its place; whether it had to be untied."""
    import onnx_ir as ir

    module, _, part = parameter.rpartition(".")
    linear = linears.get(module)
    if linear is not None and part == "weight":
        held = _constant(linear.weight)
        turned = values.T if not linear.transposed else values
        return _replace_weight(graph, linear, _cast(turned, held.dtype, parameter))
    value = linear.bias if linear is not None and part == "bias" else None
    if linear is not None and part == "bias" and value is None:
        _add_bias(graph, linear, values)
        return False
    value = value or graph.initializers[parameter]
    cast = _cast(values, _constant(value).dtype, parameter)
    value.const_value = ir.tensor(cast, name=value.name)
    return False


def _add_bias(graph: ir.Graph, linear: Linear, values: NDArray[Any]) -> None:
    """A zero bias leaves no trace in a graph; give the linear one."""
    import onnx_ir as ir

    held = _constant(linear.weight)
    bias = _initializer(
        graph, f"{linear.module}.bias", _cast(values, held.dtype, f"{linear.module}.bias")
    )
    for node in linear.nodes:
        product = node.outputs[0]
        add = ir.node("Add", [product, bias], name=f"{node.name or linear.module}/bias")
        total = add.outputs[0]
        total.name = str(add.name)
        total.type, total.shape = product.type, product.shape
        for user, index in list(product.uses()):
            if user is not add:
                user.replace_input_with(index, total)
        graph.insert_after(node, add)
        for index, output in enumerate(graph.outputs):
            if output is product:
                name = product.name
                product.name = f"{name}/without_bias"
                total.name = name
                graph.outputs[index] = total


def _check(model: ir.Model, linears: Mapping[str, Linear], adapter: Adapter) -> None:
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
        problems += _parameter_problem(model.graph, linears, parameter, values)
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise AdapterMismatchError(
            f"the adapter does not fit this model: {'; '.join(problems[:_LISTED])}{more}"
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
    if linear is not None and part in ("weight", "bias"):
        shape = (linear.out_features, linear.in_features)[: 2 if part == "weight" else 1]
    elif parameter in graph.initializers:
        initializer = graph.initializers[parameter]
        if len(_users(initializer)) > 1 and initializer.shape and len(initializer.shape) > 1:
            return [f"{parameter} is shared by several parts of the graph"]
        shape = tuple(_constant(initializer).shape)
    else:
        return [f"{parameter} (modules_to_save) is no weight of the graph"]
    if values.shape != shape:
        return [f"{parameter} is {list(values.shape)}, the base has {list(shape)}"]
    return []


def _users(value: ir.Value) -> set[ir.Node]:
    """The nodes that use `value`, seen through whatever only carries or turns it."""
    users: set[ir.Node] = set()
    for node, _ in value.uses():
        if node.op_type in ("Cast", "Identity", "Transpose"):
            users |= _users(node.outputs[0])
        else:
            users.add(node)
    return users


def _initializer(graph: ir.Graph, name: str, values: NDArray[Any]) -> ir.Value:
    import onnx_ir as ir

    while name in graph.initializers:
        name += ".merged"
    tensor = ir.tensor(values, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _constant(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()
