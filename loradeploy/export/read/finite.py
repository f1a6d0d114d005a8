"""Refuse weights with values that are not finite, such as a damaged row of an embedding.

A trial runs a few tokens, and would not meet the row. What may be infinite on purpose:

    a number alone           a bound, or what hides a position
    −inf, no value above 0   a mask, or a penalty for distance, that is added to scores
    −inf in a vector         a bias that suppresses tokens
    −inf outside of weights  any constant of a graph that no product and no lookup takes
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.base_files import base_tensors
from loradeploy.errors import ModelError, shortened
from loradeploy.export.match.operators import is_unreached
from loradeploy.export.match.products import OPERATORS

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

# Operators whose inputs are weights, and those that may be between a weight and them.
_TAKE_WEIGHTS: Final = (*OPERATORS, "Conv", "Gather", "FusedMatMul")
_CARRIERS: Final = ("Cast", "DequantizeLinear", "Identity", "Reshape", "Squeeze", "Transpose")
# The bits of the exponent, by the size of a number: all are set if it is not finite.
_EXPONENTS: Final = {2: 0x7C00, 4: 0x7F800000, 8: 0x7FF0000000000000}
_BFLOAT16: Final = 0x7F80
_BLOCK: Final = 1 << 20  # numbers


def check_finite_graph(graph: ir.Model, file: Path) -> None:
    """Raise ModelError if a weight of the graph, which was read from `file`, is not finite."""
    for body in graph.graphs():
        for value in body.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.size < 2 or not tensor.dtype.is_floating_point():
                continue
            if tensor.dtype.bitwidth < 16 or _is_finite(tensor.numpy()):
                continue
            _refuse(str(value.name), tensor.numpy(), file, added=not _is_weight(value))


def check_finite_checkpoint(directory: Path) -> None:
    """Raise ModelError if a weight of the checkpoint in `directory` is not finite."""
    for name, tensor in base_tensors(directory).items():
        if tensor.dtype in ("F16", "F32", "F64"):
            finite = tensor.raw.size == 0 or _is_finite(tensor.array())
        elif tensor.dtype == "BF16":
            finite = _all_below(tensor.raw.view(np.uint16), _BFLOAT16)
        else:
            continue
        if not finite and tensor.array().size > 1:
            _refuse(name, tensor.array(), directory, added=False)


def _refuse(name: str, values: NDArray[Any], where: Path, *, added: bool) -> None:
    """Raise ModelError, unless the infinite ones of `values` are on purpose.

    `added`: whether the tensor is known to be no weight.
    """
    numbers = values.reshape(-1).astype(np.float32)
    hides = np.isneginf(numbers)
    damaged = int((~np.isfinite(numbers) & ~hides).sum())
    vector = numbers.size == max(values.shape, default=1)
    if not damaged and (added or vector or not (numbers > 0).any()):
        return
    count = int((~np.isfinite(numbers)).sum())
    raise ModelError(
        f"{where}: {count} of the {numbers.size} values of {shortened(name)}"
        f" {'is' if count == 1 else 'are'} NaN or infinite: the file is damaged, or its training"
        " or conversion overflowed; fetch or convert it again"
    )


def _is_weight(value: ir.Value) -> bool:
    """Whether a product or a lookup takes the constant, directly or through `_CARRIERS`."""
    for node, _ in value.uses():
        if node.op_type in _TAKE_WEIGHTS or is_unreached(node):
            return True
        if node.op_type in _CARRIERS and any(map(_is_weight, node.outputs)):
            return True
    return False


def _is_finite(values: NDArray[Any]) -> bool:
    if values.dtype.kind != "f":  # bfloat16, which numpy lacks
        return _all_below(values.view(np.uint16), _BFLOAT16)
    size = values.dtype.itemsize
    return _all_below(values.view(f"u{size}"), _EXPONENTS[size])


def _all_below(bits: NDArray[Any], exponent: int) -> bool:
    """Whether no number has all bits of the exponent. Read in blocks, without a copy."""
    flat = bits.reshape(-1)
    mask = flat.dtype.type(exponent)
    return not any(
        ((flat[begin : begin + _BLOCK] & mask) == mask).any()
        for begin in range(0, flat.size, _BLOCK)
    )
