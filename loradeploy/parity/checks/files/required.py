"""Whether required.onnx and its values are made of the graph and the adapters in the bundle.

Clients that feed all inputs run them instead of model.onnx, which the backends run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.bundle.adapter_inputs.factors import branch_choice
from loradeploy.bundle.adapter_inputs.native import read_onnx_adapter
from loradeploy.bundle.names import (
    ADAPTERS_DIRECTORY,
    GRAPH_NAME,
    NATIVE_SUFFIX,
    REQUIRED_NAME,
    REQUIRED_VALUES_NAME,
)
from loradeploy.errors import BundleError, LoraDeployError, first_line
from loradeploy.export.graph.file import load_graph
from loradeploy.export.passes.forms.required import required_graph
from loradeploy.parity.checks.files.graphs import difference

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.parity.checks.files.graphs import BundleGraphs
    from loradeploy.parity.context import CheckContext

ASPECT: Final = "required inputs"


def differing_required(context: CheckContext, graphs: BundleGraphs) -> Iterator[tuple[str, str]]:
    """Yield the aspect and a message for each difference; nothing if there is no required.onnx.

    The graph of `graphs` becomes the one with required inputs.
    """
    bundle = context.bundle
    if not (bundle / REQUIRED_NAME).is_file():
        return
    made, base = required_graph(graphs.decoder, context.manifest)
    try:
        message = difference(load_graph(bundle / REQUIRED_NAME), made)
        values, _ = read_arrays(bundle / REQUIRED_VALUES_NAME, error=BundleError)
    except LoraDeployError as problem:
        yield ASPECT, first_line(problem)
        return
    if message is not None:
        yield ASPECT, f"{REQUIRED_NAME} is not made of {GRAPH_NAME}: {message}: export again"
    if not _equal(values, base):
        yield (
            ASPECT,
            f"{REQUIRED_VALUES_NAME} does not have the defaults of {GRAPH_NAME}: export again",
        )
    for name in context.manifest.adapters:
        place = bundle / ADAPTERS_DIRECTORY / name
        given = place.with_name(f"{name}.safetensors")
        native = place.with_name(f"{name}{NATIVE_SUFFIX}")
        if not (given.is_file() and native.is_file()):
            continue
        try:
            values, _ = read_arrays(given, error=BundleError)
            own = {**read_onnx_adapter(native), **branch_choice(context.manifest)}
            same = _equal(values, {**base, **own})
        except LoraDeployError as problem:
            yield ASPECT, first_line(problem)
            continue
        if not same:
            yield ASPECT, f"{given.name} and {native.name} differ: export again"


def _equal(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(values, other[name]) for name, values in one.items()
    )
