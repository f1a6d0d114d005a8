"""Merge an adapter into the weights of a graph, without torch and without a copy of the model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors, Rows
from loradeploy.adapter.algebra.delta import as_matrix, expert_updates, matrices
from loradeploy.adapter.algebra.dora import output_scale
from loradeploy.adapter.fitting.fit import AdaptableBase, check_fit
from loradeploy.adapter.fitting.fit import Layer as Described
from loradeploy.adapter.fitting.settle import same_values
from loradeploy.bundle.manifest import MergeError
from loradeploy.errors import AdapterMismatchError, ExportError
from loradeploy.export.graph.edit import (
    add_constant,
    constant_of,
    free_name,
    remove_unused,
    set_computed,
    set_constant,
)
from loradeploy.export.match.experts import Experts, find_experts
from loradeploy.export.match.linears import Linear
from loradeploy.export.match.operators import check_operators
from loradeploy.export.match.products import products
from loradeploy.export.match.quantized import MATMUL_NBITS
from loradeploy.export.match.whole.parameters import Layers, cast
from loradeploy.export.match.whole.parts import Part, find_parts
from loradeploy.export.merge_error import Round, Tally, sampled
from loradeploy.export.passes.precision.quantize import requantize_product

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    `modules`: those whose weights got an update. `parameters`: those that were replaced. `untied`:
    modules that shared their weight with others, and got a copy. `error`: the rounding error of
    the update in the stored precision; None without an update.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    untied: tuple[str, ...]
    error: MergeError | None = None


def merge_adapter(
    model: ir.Model,
    linears: Mapping[str, Linear],
    adapter: Adapter,
    *,
    weights: Mapping[str, NDArray[Any]] | None = None,
    rounding: Mapping[str, Round] = MappingProxyType({}),
    requantize: bool = False,
    name: str = "this graph",
    digest: str | None = None,
) -> MergeReport:
    """W ← W + s · B A for every module of `adapter`, in float32 with one final cast.

    With DoRA W ← m / ‖W + s · B A‖ · (W + s · B A), over each output's row. Linear layers,
    embeddings and convolutions take factors. Fully trained parameters (modules_to_save, biases)
    replace those of the graph, s times the bias of B is added (`lora_bias`), and a bias that the
    graph lacks is added. Base weights and rows in
    the adapter are written first, for all modules that share them. A weight that is shared with
    another part of the graph, such as an embedding tied to the output head, is copied first: the
    other part keeps the original.

    `weights`: weights of modules, [out, in] of a linear, in a higher precision than the graph's, to
    start from. `rounding`: how weights of a kind of layer (linear, embedding, conv2d) are rounded
    afterwards, to compute the error. `requantize`: merge into quantized weights and quantize them
    again, or round them to float8 again. `name`: the name of the base in messages. `digest`: that
    of the checkpoint, if known.

    Raises:
        AdapterError: the factors apply to a base that the initialization changed, or to a
            convolution with several groups.
        AdapterMismatchError: the graph lacks a module, or a size differs; one error lists all.
        ExportError: a weight is quantized, or the result does not fit into the graph's dtype.
    """
    layers = Layers(model.graph, linears, find_parts(model))
    experts = find_experts(model)
    base = adaptable(layers, adapter, experts, name=name, digest=digest)
    _check(layers, experts, adapter, base, requantize=requantize)
    _overwrite(layers, adapter)
    untied, tally = [], Tally()
    for module in adapter.modules:
        pair, s = adapter.factors[module], adapter.scaling(module)
        if pair.kind == "experts":
            _merge_experts(model.graph, experts[module], pair, s, tally, rounding)
            continue
        layer = _layer(layers, module, pair)
        assert layer is not None
        if isinstance(layer, Linear) and layer.quantized:
            _merge_quantized(model.graph, layer, pair, s, tally)
            continue
        start = None if weights is None else weights.get(module)
        if _merge_weight(layers, layer, pair, s, start, tally, rounding):
            untied.append(module)
    for parameter, values in sorted(adapter.saved.items()):
        if layers.replace(parameter, values):
            untied.append(parameter.rpartition(".")[0])
    for module in adapter.modules:
        if (own := adapter.factors[module].bias) is not None:
            layers.add_to_bias(module, np.float32(adapter.scaling(module)) * own.astype(np.float32))
    remove_unused(model.graph)
    saved = tuple(sorted(adapter.saved))
    return MergeReport(adapter.modules, saved, tuple(untied), tally.error())


def _overwrite(layers: Layers, adapter: Adapter) -> None:
    """Overwrite the graph's weights with the base weights and rows in the adapter."""
    groups: list[Mapping[str, NDArray[Any] | Rows]] = [adapter.carried, adapter.rows]
    for group in groups:
        for first, second in itertools.combinations(sorted(group), 2):
            if layers.may_share(first, second) and not same_values(group[first], group[second]):
                raise AdapterMismatchError(
                    f"{first} and {second} are tied in this graph, or have equal values, and differ"
                    " in the adapter: merge it into the untied checkpoint (tie_word_embeddings:"
                    " false), as it was trained"
                )
    for parameter, values in sorted(adapter.carried.items()):
        layers.overwrite(parameter, values, others=adapter.carried)
    for parameter, rows in sorted(adapter.rows.items()):
        values = layers.values_of(parameter).copy()
        values[list(rows.indices)] = rows.values
        layers.overwrite(parameter, values, others=adapter.rows)


def _layer(layers: Layers, module: str, pair: Factors) -> Linear | Part | None:
    """The layer of the graph for the factors, if it is of the same kind."""
    if pair.kind == "linear":
        return layers.linears.get(module)
    part = layers.parts.get(module)
    return part if part is not None and part.kind == pair.kind else None


def _merge_weight(
    layers: Layers,
    layer: Linear | Part,
    pair: Factors,
    s: float,
    start: NDArray[Any] | None,
    tally: Tally,
    rounding: Mapping[str, Round],
) -> bool:
    """Merge into the weight of a layer, and return whether it had to be untied.

    A weight of one layer is computed again when it is written, so that the merged weights of a
    model are never in memory together.
    """
    stored = layer.weight.const_value
    assert stored is not None
    dtype = stored.dtype.numpy()
    W = _float_weight(layer, stored, start)
    rows = _own_rows(layer, _matrix(layer, W, pair))
    before = sampled(rows)
    _update(rows, pair, s)
    merged = cast(W, dtype, layer.module)
    kind = "linear" if isinstance(layer, Linear) else layer.kind
    tally.add(before, sampled(rows), rounding.get(kind, lambda W: W.astype(dtype)))

    def computed() -> NDArray[Any]:
        W = _float_weight(layer, stored, start)
        _update(_own_rows(layer, _matrix(layer, W, pair)), pair, s)
        return cast(W, dtype, layer.module)

    if not layers.is_shared(layer):
        set_computed(layer.weight, computed)
        return False
    layers.untie(layer, merged)
    return True


def _float_weight(
    layer: Linear | Part, stored: ir.TensorProtocol, start: NDArray[Any] | None
) -> NDArray[np.float32]:
    """A copy of the `stored` weight, or of `start` in its orientation, in float32."""
    numbers = stored.numpy() if start is None else start.T if _transposed(layer) else start
    return np.array(numbers, np.float32, order="C")


def _matrix(layer: Linear | Part, W: NDArray[np.float32], pair: Factors) -> NDArray[np.float32]:
    """The weight in the graph as a matrix [out, in], a view."""
    return W.T if _transposed(layer) else as_matrix(W, pair)


def _transposed(layer: Linear | Part) -> bool:
    """Whether the graph has the weight as [in, out]."""
    return isinstance(layer, Linear) and not layer.transposed


def _own_rows(layer: Linear | Part, matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows of the matrix [out, in] that are the layer's, if others are packed with it."""
    if isinstance(layer, Linear) and layer.slice is not None:
        return matrix[slice(*layer.slice)]
    return matrix


def _merge_experts(
    graph: ir.Graph,
    experts: Experts,
    pair: Factors,
    s: float,
    tally: Tally,
    rounding: Mapping[str, Round],
) -> None:
    """W ← W + s · B A of each expert."""
    stored = constant_of(experts.weight)
    before = stored.astype(np.float32)
    after = before + expert_updates(pair, s)
    values = cast(after, stored.dtype, experts.parameter)
    if len(experts.weight.uses()) > 1:  # equal experts of two layers are one constant
        name = free_name(graph, f"{experts.parameter}.merged")
        experts.node.replace_input_with(1, add_constant(graph, name, values))
    else:
        set_constant(experts.weight, values)
    matrix = (-1, pair.A.shape[1])
    old, new = (each.swapaxes(1, 2).reshape(matrix) for each in (before, after))
    tally.add(sampled(old), sampled(new), rounding.get("experts", lambda W: W.astype(stored.dtype)))


def _update(matrix: NDArray[np.float32], pair: Factors, s: float) -> None:
    """Merge into the matrix [out, in] in place."""
    scale = None if pair.magnitude is None else output_scale(matrix, pair, s)
    A, B = matrices(pair)
    if matrix.flags.c_contiguous:
        matrix += (np.float32(s) * B) @ A
    else:
        matrix.T[...] += A.T @ (np.float32(s) * B).T  # in the order of its memory
    if scale is not None:
        matrix *= scale[:, np.newaxis]


def _merge_quantized(graph: ir.Graph, layer: Linear, pair: Factors, s: float, tally: Tally) -> None:
    """Merge into a quantized weight, which can represent the update only with an error."""
    node = layer.nodes[0]
    product = next(each for each in products(graph) if each.node is node)
    before = product.rows(list(range(product.out_features)))
    if before is None or _cannot_be_packed(layer):
        raise ExportError(
            f"{layer.module}: the quantized weight of a {node.op_type} cannot be quantized again:"
            " merge into the unquantized graph, or use side inputs"
        )
    W = before.copy()
    _update(_own_rows(layer, W), pair, s)
    for each in layer.nodes:
        requantize_product(each, graph, W)
    after = next(each for each in products(graph) if each.node is node)
    stored = after.rows(list(range(product.out_features)))
    assert stored is not None
    tally.add_stored(*(_own_rows(layer, each) for each in (before, W, stored)))


def _check(
    layers: Layers,
    experts: Mapping[str, Experts],
    adapter: Adapter,
    base: AdaptableBase,
    *,
    requantize: bool,
) -> None:
    check_fit(adapter, base)
    quantized = [m for m in adapter.modules if _is_quantized(layers, experts, m, adapter)]
    if quantized and not requantize:
        final = any(_cannot_be_packed(layers.linears.get(module)) for module in quantized)
        also = "use side inputs" if final else "accept the rounding error with `requantize`"
        raise ExportError(
            f"{quantized[0]} is already quantized, and merging into it would lose the adapter's"
            f" detail: merge into the unquantized model and quantize the result, or {also}"
        )
    for module in adapter.modules:
        if (layer := _layer(layers, module, adapter.factors[module])) is not None:
            check_operators(module, layer.nodes)
    for parameter in sorted(adapter.saved):
        module = parameter.rpartition(".")[0]
        replaced = layers.linears.get(module) or layers.parts.get(module)
        if replaced is not None:
            check_operators(module, replaced.nodes)


def _is_quantized(
    layers: Layers, experts: Mapping[str, Experts], module: str, adapter: Adapter
) -> bool:
    """Whether the weight of `module` is packed, or of integers or float8 behind a Cast.

    Rounding to float8 changes a weight by up to 6 %, more than rounding to int8 does.
    """
    pair = adapter.factors[module]
    layer = experts[module] if pair.kind == "experts" else _layer(layers, module, pair)
    assert layer is not None  # check_fit found it
    packed = isinstance(layer, Linear) and layer.quantized
    stored = layer.weight.const_value
    return packed or (stored is not None and stored.dtype.itemsize == 1)


def _cannot_be_packed(layer: Linear | None) -> bool:
    """Whether the weight is quantized in a form that `requantize` does not write."""
    return layer is not None and layer.quantized and layer.nodes[0].op_type != MATMUL_NBITS


def adaptable(
    layers: Layers,
    adapter: Adapter,
    experts: Mapping[str, Experts] = MappingProxyType({}),
    *,
    name: str,
    digest: str | None = None,
) -> AdaptableBase:
    """Describe the graph's layers, and the parameters that `adapter` changes, for `check_fit`.

    `name`: the name of the graph in messages. `digest`: that of the checkpoint, if known.
    """
    names = (*adapter.saved, *adapter.carried, *adapter.rows)
    shapes = {n: shape for n in names if (shape := layers.shape_of(n)) is not None}
    biased = [f"{m}.bias" for m, pair in adapter.factors.items() if pair.bias is not None]
    problems = {
        name: problem
        for name in (*names, *biased)
        if (problem := layers.problem_with(name)) is not None
    }
    found: dict[str, Linear | Part] = {**layers.parts, **layers.linears}
    described = {
        module: described
        for module, layer in found.items()
        if (described := _described(layer)) is not None
    }
    for parameter, each in experts.items():
        count, into, out = each.shape
        described[parameter] = Described("experts", (into,), out, experts=count)
    return AdaptableBase(
        name, described, parameters=shapes, weights=shapes, refused=problems, digest=digest
    )


def _described(layer: Linear | Part) -> Described | None:
    """The sizes of a layer's factors; None for a norm, which takes none."""
    if isinstance(layer, Linear):
        return Described("linear", (layer.in_features,), layer.out_features)
    if layer.kind == "norm":
        return None
    if layer.kind == "embedding":
        return Described("embedding", layer.shape[:1], layer.outputs)
    groups = max((_groups(node) for node in layer.nodes), default=1)
    inputs, *kernel = layer.shape[1:]
    return Described("conv2d", (inputs * groups, *kernel), layer.outputs, groups)


def _groups(node: ir.Node) -> int:
    attribute = node.attributes.get("group")
    return 1 if attribute is None else attribute.as_int()
