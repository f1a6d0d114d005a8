"""Graph merge: an adapter folded into a graph's weights. No torch, no copy of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.delta import as_matrix, matrices
from loradeploy.adapter.dora import output_scale
from loradeploy.adapter.targets import is_saved
from loradeploy.errors import AdapterMismatchError, ExportError, listed
from loradeploy.export.find import Linear
from loradeploy.export.parts import Part, find_parts
from loradeploy.export.places import Layers, cast
from loradeploy.export.rewire import constant_of, remove_unused

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

_LISTED = 6


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

    With DoRA W ← m / ‖W + s · B A‖ · (W + s · B A), over each output's row. Linear layers,
    embeddings and convolutions take factors; what the adapter trained whole (modules_to_save,
    biases) is put in its place, a bias that the graph lacks is added. `weights` gives modules'
    weights, [out, in] of a linear, at a higher precision than the graph's, to start from. A weight
    that something else in the graph shares, such as an embedding tied to the output head, is copied
    first: the other user keeps its own.

    Raises:
        AdapterError: the factors are for a base that an initialisation changed, or a convolution of
            several groups has some.
        AdapterMismatchError: the graph lacks a module, or a size differs; all are in the one error.
        ExportError: a weight is quantised, or the result does not fit into the graph's dtype.
    """
    adapter.check_plain()
    layers = Layers(model.graph, linears, find_parts(model))
    _check(layers, adapter)
    untied = []
    for module in adapter.modules:
        layer = _layer(layers, module, adapter.factors[module])
        assert layer is not None
        start = None if weights is None else weights.get(module)
        merged = _merged(layer, adapter.factors[module], adapter.scaling(module), start)
        if layers.replace_weight(layer, merged):
            untied.append(module)
    for parameter, values in sorted(adapter.saved.items()):
        if layers.replace(parameter, values):
            untied.append(parameter.rpartition(".")[0])
    remove_unused(model.graph, inputs=False)
    return MergeReport(adapter.modules, tuple(sorted(adapter.saved)), tuple(untied))


def _layer(layers: Layers, module: str, pair: Factors) -> Linear | Part | None:
    """The layer of the graph that the factors are for, where their kind is the same."""
    if pair.kind == "linear":
        return layers.linears.get(module)
    part = layers.parts.get(module)
    return part if part is not None and part.kind == pair.kind else None


def _merged(
    layer: Linear | Part, pair: Factors, s: float, start: NDArray[Any] | None
) -> NDArray[Any]:
    """The new weight, in the initializer's orientation and dtype."""
    held = constant_of(layer.weight)
    turned = isinstance(layer, Linear) and not layer.transposed
    if start is None:
        W = held.astype(np.float32)
    else:
        W = np.array(start.T if turned else start, dtype=np.float32, order="C")
    matrix = W.T if turned else as_matrix(W, pair)  # [out, in], a view
    if isinstance(layer, Linear) and layer.slice is not None:
        matrix = matrix[slice(*layer.slice)]
    scale = None if pair.magnitude is None else output_scale(matrix, pair, s)
    A, B = matrices(pair)
    if turned:
        matrix.T[...] += A.T @ (np.float32(s) * B).T  # [in, out]: in the order of its memory
    else:
        matrix += (np.float32(s) * B) @ A
    if scale is not None:
        matrix *= scale[:, np.newaxis]
    return cast(W, held.dtype, layer.module)


def _check(layers: Layers, adapter: Adapter) -> None:
    problems = []
    for module, pair in sorted(adapter.factors.items()):
        problems += _factor_problems(layers, module, pair)
    for parameter, values in sorted(adapter.saved.items()):
        whole = is_saved(parameter, adapter.config)
        named = f"{parameter} ({'modules_to_save' if whole else 'a trained bias'})"
        problems += _parameter_problems(layers, parameter, values, named)
    if problems:
        raise AdapterMismatchError(
            f"the adapter does not fit this model: {listed(problems, _LISTED)}"
        )
    packed = [m for m in adapter.modules if m in layers.linears and layers.linears[m].quantised]
    if packed:
        raise ExportError(
            f"{packed[0]} is already quantised, and merging into it would lose the adapter's"
            " detail: merge into the unquantised model and quantise the result"
        )


_NAMED: Mapping[str, str] = {
    "linear": "linear layer",
    "embedding": "embedding",
    "conv2d": "convolution",
}


def _factor_problems(layers: Layers, module: str, pair: Factors) -> list[str]:
    layer = _layer(layers, module, pair)
    if layer is None:
        return [f"{module} is no {_NAMED[pair.kind]} of the graph"]
    if pair.groups > 1:
        return []  # refused with its own words, whatever the shapes
    A, B = pair.A, pair.B
    if isinstance(layer, Linear):
        sizes, theirs = (layer.in_features, layer.out_features), (A.shape[1], B.shape[0])
    elif layer.kind == "embedding":
        sizes, theirs = layer.shape, (A.shape[1], B.shape[0])  # type: ignore[assignment]
    else:
        sizes, theirs = layer.shape, (B.shape[0], *A.shape[1:])  # type: ignore[assignment]
    if sizes == theirs:
        return []
    ours, its = (" → ".join(map(str, shape)) for shape in (sizes, theirs))
    return [f"{module} is {ours}, the adapter's factors are for {its}"]


def _parameter_problems(
    layers: Layers, parameter: str, values: NDArray[Any], named: str
) -> list[str]:
    problem = layers.problem_with(parameter)
    if problem is not None:
        return [problem]
    shape = layers.shape_of(parameter)
    if shape is None:
        return [f"{named} is no weight of the graph"]
    if values.shape != shape:
        return [f"{parameter} is {list(values.shape)}, the base has {list(shape)}"]
    return []
