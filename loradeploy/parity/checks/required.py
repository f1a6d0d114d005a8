"""Whether required.onnx and its values are made of the graph and the adapters in the bundle.

Clients that feed all inputs run them instead of model.onnx, which the backends run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.bundle.adapter_inputs.native import read_onnx_adapter
from loradeploy.bundle.names import (
    ADAPTERS_DIRECTORY,
    GRAPH_NAME,
    NATIVE_SUFFIX,
    REQUIRED_NAME,
)
from loradeploy.errors import BundleError, LoraDeployError, first_line
from loradeploy.export.passes.forms.required import BASE_INPUTS_NAME, required_graph

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.parity.context import CheckContext

ASPECT: Final = "required inputs"


def differing_required(context: CheckContext) -> Iterator[tuple[str, str]]:
    """Yield the aspect and a message for each difference; nothing if there is no required.onnx."""
    import onnx_ir as ir

    bundle = context.bundle
    if not (bundle / REQUIRED_NAME).is_file():
        return
    try:
        made, base = required_graph(ir.load(bundle / GRAPH_NAME), context.manifest)
        own = ir.load(bundle / REQUIRED_NAME)
        values, _ = read_arrays(bundle / BASE_INPUTS_NAME, error=BundleError)
    except Exception as problem:  # onnx_ir raises anything for a damaged file
        yield ASPECT, f"{REQUIRED_NAME} cannot be read: {first_line(problem)}"
        return
    if _serialized(made) != _serialized(own):
        yield ASPECT, f"{REQUIRED_NAME} is not made of {GRAPH_NAME}: export again"
    if not _equal(values, base):
        yield (
            ASPECT,
            f"{BASE_INPUTS_NAME} does not have the defaults of {GRAPH_NAME}: export again",
        )
    for name in context.manifest.adapters:
        place = bundle / ADAPTERS_DIRECTORY / name
        given = place.with_name(f"{name}.safetensors")
        native = place.with_name(f"{name}{NATIVE_SUFFIX}")
        if not (given.is_file() and native.is_file()):
            continue
        try:
            values, _ = read_arrays(given, error=BundleError)
            same = _equal(values, {**base, **read_onnx_adapter(native)})
        except LoraDeployError as problem:
            yield ASPECT, first_line(problem)
            continue
        if not same:
            yield ASPECT, f"{given.name} and {native.name} differ: export again"


def _equal(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(values, other[name]) for name, values in one.items()
    )


def _serialized(model: Any) -> bytes:
    import onnx_ir as ir

    return bytes(ir.serde.serialize_model(model).SerializeToString(deterministic=True))
