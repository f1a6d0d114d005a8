"""Weights that are put together while they are written, some rows at a time.

    columns of several weights     q, k and v side by side: the product that is made one
    a weight that is transposed    as most of a checkpoint's are; numpy writes it number by number

So an export holds the source's weights and no second copy of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from loradeploy.bundle.names import GRAPH_DATA_NAME, GRAPH_NAME

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

# Smaller constants stay in the graph's own file, where tools show them.
_EXTERNAL_BYTES: Final = 1024
_BLOCK_BYTES: Final = 1 << 23
_PARTS: Final = "parts"  # the key under which a tensor has what it is joined of
_BYTE: Final = 8  # bits; numbers of fewer are packed, which onnx-ir does


def joined(name: str, parts: Sequence[ir.TensorProtocol]) -> ir.TensorProtocol:
    """The columns of `parts` side by side, [rows, columns]; computed again at each use."""
    import onnx_ir as ir

    columns = sum(int(part.shape.numpy()[1]) for part in parts)

    def whole() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate(list(_blocks(parts))), dtype=parts[0].dtype, name=name)

    shape = ir.Shape([int(parts[0].shape.numpy()[0]), columns])
    tensor: ir.TensorProtocol = _joined_type()(whole, parts[0].dtype, shape, name=name)
    tensor.meta[_PARTS] = parts
    return tensor


@functools.cache  # a class is freed by the collector alone, and what it refers to with it
def _joined_type() -> Any:
    import onnx_ir as ir

    class Joined(ir.LazyTensor):
        def tofile(self, file: BinaryIO) -> None:
            for block in _blocks(self.meta[_PARTS]):
                file.write(block.view(np.uint8).data)  # numpy has no buffer of bfloat16

    return Joined


def _blocks(parts: Sequence[ir.TensorProtocol]) -> Iterator[NDArray[Any]]:
    """Some rows of all `parts` at a time."""
    arrays = [part.numpy() for part in parts]
    columns = sum(array.shape[1] for array in arrays)
    step = max(1, _BLOCK_BYTES // max(1, columns * arrays[0].itemsize))
    for begin in range(0, max(1, len(arrays[0])), step):  # of no rows one empty block
        rows = [array[begin : begin + step] for array in arrays]
        block = np.empty((len(rows[0]), columns), arrays[0].dtype)
        yield np.concatenate(rows, axis=1, out=block)


def save_graph(model: ir.Model, directory: Path) -> None:
    """Write `model` and its weights to `directory`, and give up the weights in memory.

    Of `model` only the nodes are of use afterwards.
    """
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and _is_transposed(tensor):
            value.const_value = joined(str(tensor.name), [tensor])
    ir.save(
        model,
        directory / GRAPH_NAME,
        external_data=GRAPH_DATA_NAME,
        size_threshold_bytes=_EXTERNAL_BYTES,
    )
    # onnx-ir 1.1 keeps what once was an input, as every weight of a trace was, and joined ones are.
    once = getattr(model.graph.inputs, "_ref_counter", ())
    for value in (*model.graph.initializers.values(), *once):
        value.const_value = None


def _is_transposed(tensor: ir.TensorProtocol) -> bool:
    """Whether its numbers are in memory, a matrix that is not in the order of its rows."""
    import onnx_ir as ir

    if isinstance(tensor, ir.LazyTensor | ir.ExternalTensor) or len(tensor.shape) != 2:
        return False
    whole = tensor.dtype != ir.DataType.STRING and tensor.dtype.bitwidth >= _BYTE
    return whole and not tensor.numpy().flags.c_contiguous
