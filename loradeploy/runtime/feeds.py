"""What a run is fed: arrays in the types and shapes that the graph takes, as OrtValues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from loradeploy.bundle.manifest import TensorSpec
from loradeploy.errors import UsageError, listed_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

Feeds = Mapping[str, "NDArray[Any] | onnxruntime.OrtValue"]


def feed_values(feeds: Feeds, inputs: Mapping[str, TensorSpec]) -> dict[str, onnxruntime.OrtValue]:
    """The feeds as OrtValues, arrays checked against `inputs`; on the host, views of them.

    Raises:
        UsageError: a feed is missing, unknown, or of a type or shape that the graph does not take.
    """
    if feeds.keys() != inputs.keys():
        missing = listed_names(sorted(inputs.keys() - feeds.keys()))
        unknown = listed_names(sorted(map(str, feeds.keys() - inputs.keys())))
        raise UsageError(f"the feeds do not fit the graph: missing {missing}; unknown {unknown}")
    values = {}
    for name, feed in feeds.items():
        if isinstance(feed, onnxruntime.OrtValue):
            values[name] = feed  # onnxruntime checks these itself
            continue
        array = _in_type(inputs[name], np.ascontiguousarray(feed))
        _check_feed(inputs[name], array)
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return values


def _in_type(spec: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
    """Whole numbers and truth values in the type that the graph takes, where they all fit in it.

    Floats stay as they are: another width would round them.
    """
    if array.dtype.name == spec.dtype or array.dtype.kind not in "biu":
        return array
    if not spec.dtype.startswith(("int", "uint", "bool", "float")):
        return array
    cast = array.astype(spec.dtype)
    return cast if np.array_equal(cast, array) else array


def _check_feed(spec: TensorSpec, array: NDArray[Any]) -> None:
    fits = len(array.shape) == len(spec.shape) and all(
        size == told
        for size, told in zip(array.shape, spec.shape, strict=True)
        if isinstance(told, int)
    )
    if array.dtype.name != spec.dtype or not fits:
        told = ", ".join(map(str, spec.shape))
        raise UsageError(
            f"the feed {spec.name} is {array.dtype} {list(array.shape)},"
            f" the graph takes {spec.dtype} [{told}]"
        )
