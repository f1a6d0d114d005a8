"""Write joined and transposed weights block by block, without a second copy in memory.

joined columns       the weights of q, k and v side by side, for their fused product
joined rows          the same of packed weights, whose first axis is the outputs
transposed weights   most of a checkpoint's, which numpy alone would write value by value
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
_PARTS: Final = "parts"  # the key of a joined tensor's parts in its metadata
_BYTE: Final = 8  # bits; onnx-ir packs types with fewer


def joined(name: str, parts: Sequence[ir.TensorProtocol], *, axis: int = 1) -> ir.TensorProtocol:
    """`parts` side by side along an axis, computed anew at each use.

    Columns (`axis` 1) are those of matrices; rows (`axis` 0) have any further axes.
    """
    import onnx_ir as ir

    shape = list(parts[0].shape.numpy())
    shape[axis] = sum(int(part.shape.numpy()[axis]) for part in parts)

    def whole() -> ir.TensorProtocol:
        return ir.tensor(
            np.concatenate(list(_blocks(parts, axis))), dtype=parts[0].dtype, name=name
        )

    tensor: ir.TensorProtocol = _joined_type()(whole, parts[0].dtype, ir.Shape(shape), name=name)
    tensor.meta[_PARTS] = (parts, axis)
    return tensor


@functools.cache  # one class: only the garbage collector frees classes and what they refer to
def _joined_type() -> Any:
    import onnx_ir as ir

    class Joined(ir.LazyTensor):
        def tofile(self, file: BinaryIO) -> None:
            for block in _blocks(*self.meta[_PARTS]):
                file.write(block.view(np.uint8).data)  # numpy has no buffer of bfloat16

    return Joined


def _blocks(parts: Sequence[ir.TensorProtocol], axis: int) -> Iterator[NDArray[Any]]:
    """Blocks of rows of the joined `parts`."""
    if axis == 0:
        yield from (np.ascontiguousarray(part.numpy()) for part in parts)
        return
    arrays = [part.numpy() for part in parts]
    columns = sum(array.shape[1] for array in arrays)
    step = max(1, _BLOCK_BYTES // max(1, columns * arrays[0].itemsize))
    for begin in range(0, max(1, len(arrays[0])), step):  # one empty block if there are no rows
        rows = [array[begin : begin + step] for array in arrays]
        block = np.empty((len(rows[0]), columns), arrays[0].dtype)
        yield np.concatenate(rows, axis=1, out=block)


def save_graph(model: ir.Model, directory: Path) -> None:
    """Write `model` and its weights to `directory`, and free the weights in memory.

    Afterwards only the nodes of `model` can be used.
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
    # onnx-ir 1.1 keeps references to former inputs: every weight of a trace, also joined ones.
    once = getattr(model.graph.inputs, "_ref_counter", ())
    for value in (*model.graph.initializers.values(), *once):
        value.const_value = None


def _is_transposed(tensor: ir.TensorProtocol) -> bool:
    """Whether the tensor is a matrix in memory whose values are not in row-major order."""
    import onnx_ir as ir

    if isinstance(tensor, ir.LazyTensor | ir.ExternalTensor) or len(tensor.shape) != 2:
        return False
    whole = tensor.dtype != ir.DataType.STRING and tensor.dtype.bitwidth >= _BYTE
    return whole and not tensor.numpy().flags.c_contiguous
