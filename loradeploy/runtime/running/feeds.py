"""Convert the feeds of a run to OrtValues of the graph's dtypes, and check them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from loradeploy.bundle.dtypes import NUMPY_NAMES
from loradeploy.bundle.manifest import TensorSpec
from loradeploy.errors import UsageError, first_line, listed_names, shown
from loradeploy.runtime.adapters.stacks import HOST
from loradeploy.runtime.running.limits import LOOKED_AT, SIZED, Limits, check_finite

if TYPE_CHECKING:
    from numpy.typing import NDArray


Feeds = Mapping[str, "NDArray[Any] | onnxruntime.OrtValue"]


def feed_values(
    feeds: Feeds,
    inputs: Mapping[str, TensorSpec],
    limits: Limits,
    optional: Mapping[str, TensorSpec] | None,
) -> dict[str, onnxruntime.OrtValue]:
    """Check the feeds against `inputs` and `limits`, and return OrtValues; on the host, views.

    `optional`: inputs that may be fed too.

    Raises:
        UsageError: a feed is missing, unknown, of a wrong dtype or shape, or has values for which
            the graph would silently give wrong outputs.
    """
    if not isinstance(feeds, Mapping):
        raise UsageError(f"the feeds are {shown(feeds)}: give a mapping of names to arrays")
    if optional and (own := {name: optional[name] for name in feeds if name in optional}):
        inputs = {**inputs, **own}
    if feeds.keys() != inputs.keys():
        missing = listed_names(sorted(inputs.keys() - feeds.keys()))
        unknown = listed_names(sorted(map(str, feeds.keys() - inputs.keys())))
        raise UsageError(f"the feeds do not fit the graph: missing {missing}; unknown {unknown}")
    values = {}
    shapes: dict[str, tuple[int, ...]] = {}
    numbers: dict[str, NDArray[Any]] = {}
    for name, feed in feeds.items():
        if isinstance(feed, onnxruntime.OrtValue):
            values[name] = feed  # onnxruntime checks its dtype and shape
            looked_at = name in LOOKED_AT
            if looked_at or name in SIZED or name == limits.first_past:
                shapes[name] = tuple(feed.shape())
                _check_feed(inputs[name], _dtype_of(feed, inputs[name]), shapes[name])
            if looked_at and feed.device_name() == HOST and feed.is_tensor():
                numbers[name] = feed.numpy()
            continue
        array = _in_type(inputs[name], _array(name, feed))
        _check_feed(inputs[name], _name_of(array.dtype), array.shape)
        check_finite(name, array)
        shapes[name] = array.shape
        if name in LOOKED_AT:
            numbers[name] = array
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    limits.check(shapes, numbers)
    return values


def _array(name: str, feed: object) -> NDArray[Any]:
    try:
        array = np.ascontiguousarray(feed)
    except (TypeError, ValueError, OverflowError) as problem:
        raise UsageError(f"the feed {name} makes no array: {first_line(problem)}") from None
    # onnxruntime would read numbers in another byte order as if they were in the machine's.
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _in_type(spec: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
    """Cast integers and bools to the graph's dtype if all values fit.

    Floats are unchanged: a cast could round them.
    """
    if _name_of(array.dtype) == spec.dtype or array.dtype.kind not in "biu":
        return array
    if not spec.dtype.startswith(("int", "uint", "bool", "float")):
        return array
    with np.errstate(over="ignore"):  # checked below
        cast = array.astype(spec.dtype)
    return cast if np.array_equal(cast, array) else array


@lru_cache
def _name_of(dtype: np.dtype[Any]) -> str:
    """Its name, which numpy makes anew each time, in a tenth of the time of a step's checks."""
    return str(dtype.name)


def _dtype_of(value: onnxruntime.OrtValue, spec: TensorSpec) -> str:
    """numpy's name of its dtype if it matches the input, otherwise onnxruntime's name."""
    own = str(value.data_type())
    return spec.dtype if NUMPY_NAMES.get(own) == spec.dtype else own


def _check_feed(spec: TensorSpec, dtype: str, shape: tuple[int, ...]) -> None:
    fits = len(shape) == len(spec.shape) and all(
        size == declared
        for size, declared in zip(shape, spec.shape, strict=True)
        if isinstance(declared, int)
    )
    if dtype != spec.dtype or not fits:
        expected = ", ".join(map(str, spec.shape))
        raise UsageError(
            f"the feed {spec.name} is {dtype} {shown(list(shape))},"
            f" the graph takes {spec.dtype} [{expected}]"
        )
