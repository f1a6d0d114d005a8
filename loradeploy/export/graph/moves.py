"""Operators that only move values, applied to numpy arrays as ONNX defines them since opset 13."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The inputs of a node, None for one that is missing, and its attributes by name.
Inputs = Sequence["NDArray[Any] | None"]
Attributes = Mapping[str, Any]
# A function (first input, other inputs, attributes, number of outputs) → outputs, which are views
# of the first input where possible. It raises IndexError, TypeError or ValueError for a node that
# onnxruntime would not run either.
Move = Callable[[Any, Inputs, Attributes, int], list[Any]]

# Ends of a Slice that mean up to the end, also backward.
_OPEN_ENDS: Final = (2**31 - 1, 2**63 - 1)


def _concat(x: Any, rest: Inputs, given: Attributes, outputs: int) -> list[Any]:
    return [np.concatenate([x, *rest], axis=given.get("axis", 0))]


def _gather(x: Any, rest: Inputs, given: Attributes, outputs: int) -> list[Any]:
    (at,), axis = rest, given.get("axis", 0)
    if at is None:
        raise ValueError("no indices")
    if np.ndim(at) == 0 and -x.ndim <= axis < x.ndim:
        return [np.moveaxis(x, axis, 0)[int(at)]]  # a view, where np.take copies
    return [np.take(x, at, axis=axis)]


def _slice(x: Any, rest: Inputs, given: Attributes, outputs: int) -> list[Any]:
    starts, ends = _integers(rest, 0), _integers(rest, 1)
    if starts is None or ends is None:
        raise ValueError("no starts or no ends")
    axes = _integers(rest, 2) or range(len(starts))
    steps = _integers(rest, 3) or [1] * len(starts)
    where = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        # Backward, numpy begins at no element before the first, and takes an open end as the last.
        first = max(start, -size) if step < 0 else start
        whole = step < 0 and (end < -size or end in _OPEN_ENDS)
        where[axis] = slice(first, None if whole else end, step)
    return [x[tuple(where)]]


def _split(x: Any, rest: Inputs, given: Attributes, outputs: int) -> list[Any]:
    axis, sizes = given.get("axis", 0), _integers(rest, 0)
    if sizes is None:
        size = -(-x.shape[axis] // outputs)
        return np.split(x, np.arange(1, outputs) * size, axis=axis)
    return np.split(x, np.cumsum(sizes)[:-1], axis=axis)


def _squeeze(x: Any, rest: Inputs, given: Attributes, outputs: int) -> list[Any]:
    axes = _integers(rest, 0)
    return [np.squeeze(x, tuple(axes) if axes else None)]


def _transpose(x: Any, rest: Inputs, given: Attributes, outputs: int) -> list[Any]:
    return [np.transpose(x, given.get("perm"))]


def _unsqueeze(x: Any, rest: Inputs, given: Attributes, outputs: int) -> list[Any]:
    return [np.expand_dims(x, tuple(_integers(rest, 0) or ()))]


MOVED: Final[Mapping[str, Move]] = {
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


def _integers(inputs: Inputs, index: int) -> list[int] | None:
    given = inputs[index] if len(inputs) > index else None
    return None if given is None else [int(number) for number in np.ravel(given)]
