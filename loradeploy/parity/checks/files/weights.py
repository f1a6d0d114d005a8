"""Whether the bundle's weights that are not quantized are the base's, value by value.

Prompts do not show every weight: an embedding's rows of tokens that no prompt has, or one value
among many. Quantized weights are compared when the reference takes them (reference/quantized.py).
In a merged graph, those that the adapter leaves as they are; other values, such as norms, change
every output. The values of the base beside the graph are computed from when an adapter is loaded:
no backend of the check needs those that the adapters in the bundle do not need.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.bundle.names import BASE_NAME, DEFAULTS_NAME
from loradeploy.errors import BundleError, LoraDeployError, first_line
from loradeploy.export.graph.edit import constant_of
from loradeploy.export.graph.names import modules_of_label
from loradeploy.export.passes.side_inputs.base_weights import stored_weights
from loradeploy.parity.reference.quantized import weight_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter
    from loradeploy.bundle.targets import LoraTarget
    from loradeploy.parity.checks.files.manifest import Facts

ASPECT: Final = "weights"
# The largest relative error of one rounding to a type of weights; others are quantized.
_ROUNDING: Final[Mapping[str, float]] = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}
# In these precisions, weights that are stored as float32 may have been rounded before.
_ROUNDED: Final[Mapping[str, str]] = {
    "fp16": "float16", "bf16": "bfloat16", "int8": "float16", "int4": "float16",
}  # fmt: skip
_SUBNORMAL: Final = 2.0**-24  # the smallest float16
_ROWS: Final = 4096  # compared at once


def differing_values(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yield the aspect and a message for each value of the base beside the graph that differs."""
    context, initializers = facts.context, facts.graphs.initializers
    manifest = context.manifest
    _, weights = stored_weights(initializers, manifest)
    expected = {
        DEFAULTS_NAME: {
            saved.input: constant_of(initializers[saved.input])
            for saved in manifest.saved
            if saved.input in initializers
        },
        BASE_NAME: {**_biases(facts), **weights},
    }
    for file, values in expected.items():
        try:
            own = _arrays(context.bundle / file)
        except LoraDeployError as problem:
            yield ASPECT, first_line(problem)
            continue
        for name in {**values, **own}:
            if not _close(own.get(name), values.get(name), manifest.precision):
                yield ASPECT, f"{file}: {name} is not the base's: export again"
                break


def _arrays(file: Path) -> Mapping[str, NDArray[Any]]:
    return read_arrays(file, error=BundleError)[0] if file.is_file() else {}


def _biases(facts: Facts) -> dict[str, NDArray[Any]]:
    """The biases of the layers whose outputs change; of other exporters' graphs those stated."""
    names = {f"{output.module}.bias" for output in facts.context.manifest.changed}
    if not facts.traced:
        stated = _arrays(facts.context.bundle / BASE_NAME)
        return {name: values for name, values in stated.items() if name in names}
    parameters = dict(facts.model.named_parameters(remove_duplicate=False))
    return {n: parameters[n].detach().numpy() for n in names if n in parameters}


def _close(own: NDArray[Any] | None, expected: NDArray[Any] | None, precision: str) -> bool:
    """Whether both are the same values, up to one rounding; zeros need not be written."""
    if own is None or expected is None:
        return expected is not None and not expected.any()
    if own.shape != expected.shape:
        return False
    relative = max(_precise(precision), _ROUNDING["bfloat16"] if precision == "bf16" else 0.0)
    least = _SUBNORMAL if relative >= _ROUNDING["float16"] else 0.0
    off = np.abs(own.astype(np.float32) - expected.astype(np.float32))
    return bool((off <= relative * np.abs(expected) + least).all())


def _precise(precision: str) -> float:
    """The largest relative error of weights that are stored as float32."""
    return _ROUNDING[_ROUNDED.get(precision, "float32")]


def differing_weights(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yield the aspect and a message for the first weight that is not that of the base.

    Only of graphs that loradeploy traced: other exporters may scale or reorder weights.
    """
    context, model = facts.context, facts.model
    manifest = context.manifest
    if not facts.traced:
        return
    graph = {name: value.const_value for name, value in facts.graphs.initializers.items()}
    every = dict(_layers(model))
    layers = dict(every)
    precise = _precise(manifest.precision)
    if context.merged:
        layers = _unchanged(every, context.adapters[0].adapter)
    for target in manifest.targets:
        layer = layers.pop(target.module, None)
        if layer is None or target.kind not in ("linear", "embedding"):
            continue
        if target.weight not in graph:
            yield ASPECT, f"the graph has no {target.weight}, which the manifest names"
            return
        own = _of_target(graph[target.weight], target)
        if own is not None and (
            message := _difference(target.module, own, weight_of(layer), precise)
        ):
            yield ASPECT, message
            return
    for module, own in _of_modules(graph, every, layers):
        expected = weight_of(every[module])
        # A product's weight is [in, out]; that of an embedding, or of a head tied to one, is not.
        # Which of them a square one is, its values say: a prompt shows a transposed weight.
        forms = [form for form in (own.T, own) if _fits(form, expected)] or [own]
        messages = [_difference(module, form, expected, precise) for form in forms]
        if None not in messages:
            yield ASPECT, str(messages[0])
            return


def _of_modules(
    graph: Mapping[str, Any], every: Mapping[str, Any], wanted: Collection[str]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the `wanted` modules whose weights the graph has by their names, and the values.

    Of several modules in one product, each with its columns.
    """
    for name, tensor in graph.items():
        modules = modules_of_label(name.removesuffix(".weight"))
        if not name.endswith(".weight") or not every.keys() >= set(modules):
            continue
        if set(modules).isdisjoint(wanted) or (values := _readable(tensor)) is None:
            continue
        if len(modules) == 1:
            yield modules[0], values
            continue
        begin = 0
        for module in modules:
            end = begin + len(weight_of(every[module]))
            if module in wanted:
                yield module, values[:, begin:end]
            begin = end


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    import torch

    for name, module in model.named_modules():
        kinds = (torch.nn.Linear, torch.nn.Embedding)
        if type(module) in kinds or type(module).__name__ == "Conv1D":
            yield name, module


def _unchanged(layers: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Those of `layers` that share no weight with a layer that `adapter` changes.

    Empty if the adapter names layers in another way than the model.
    """
    changed = set(adapter.factors)
    if not changed <= layers.keys():
        return {}
    for names in (adapter.saved, adapter.rows, adapter.carried):
        changed.update(name.removesuffix(".weight") for name in names)
    weights = {id(layers[name].weight) for name in changed & layers.keys()}
    return {name: layer for name, layer in layers.items() if id(layer.weight) not in weights}


def _readable(tensor: Any) -> NDArray[Any] | None:
    """The values of a matrix; None if there is none, or it is quantized."""
    if tensor is None or len(tensor.shape) != 2:
        return None
    values: NDArray[Any] = tensor.numpy()
    return values if values.dtype.name in _ROUNDING else None


def _of_target(tensor: Any, target: LoraTarget) -> NDArray[Any] | None:
    """The values of the target's module: [out, in], or [vocabulary, size] of an embedding."""
    values = _readable(tensor)
    if values is None:
        return None
    if target.kind == "embedding":
        return values.T if target.transposed else values
    rows = values if target.transposed else values.T
    begin, end = target.slice or (0, len(rows))
    return rows[begin:end]


def _fits(own: NDArray[Any], expected: NDArray[np.float32]) -> bool:
    """Whether `own` has the columns of `expected`, and its rows or more."""
    return own.shape[1:] == expected.shape[1:] and len(own) >= len(expected)


def _difference(
    module: str, own: NDArray[Any], expected: NDArray[np.float32], precise: float
) -> str | None:
    name = f"{module}.weight"
    if not _fits(own, expected):
        return f"{name} is {list(own.shape)} in the graph, {list(expected.shape)} in the base"
    relative = max(_ROUNDING[own.dtype.name], precise)
    least = _SUBNORMAL if relative == _ROUNDING["float16"] else 0.0
    for begin in range(0, len(expected), _ROWS):
        theirs = expected[begin : begin + _ROWS]
        with np.errstate(invalid="ignore", over="ignore"):  # numbers of a damaged file
            ours = own[begin : begin + len(theirs)].astype(np.float32, copy=False)
            off = ~(np.abs(ours - theirs) <= relative * np.abs(theirs) + least)  # or NaN
        if off.any():
            row, column = (int(axis[0]) for axis in np.nonzero(off))
            return (
                f"{name} [{begin + row}, {column}] is {ours[row, column]:.6g} in the graph,"
                f" {theirs[row, column]:.6g} in the base: export again"
            )
    return None
