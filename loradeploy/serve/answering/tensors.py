"""Tensors of the Open Inference Protocol, in JSON or as bytes after it, from and to arrays."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.dtypes import PROTOCOL_NAMES
from loradeploy.errors import shown
from loradeploy.serve.problems import RequestError, refused
from loradeploy.serve.schemas.inference import InferRequest, InputTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The header with the length of the JSON, if bytes follow it.
LENGTH_HEADER: Final = "Inference-Header-Content-Length"
# The protocol's dtype names, by numpy's.
DATATYPES: Final[Mapping[str, str]] = {
    dtype: datatype
    for dtype, datatype in PROTOCOL_NAMES.items()
    if dtype != "bfloat16"  # numpy has no such dtype
}
_DTYPES: Final = {datatype: dtype for dtype, datatype in DATATYPES.items()}
# Maximum bytes of a response's tensors, and the assumed bytes of a number in JSON.
_MOST: Final = 64 << 20
_JSON_NUMBER: Final = 20


def arrays_of(request: InferRequest, tail: bytes | None) -> dict[str, NDArray[Any]]:
    """The inputs of a request, by name. `tail`: the bytes after its JSON, None if not allowed.

    Raises:
        RequestError: 400, a tensor does not match its declaration.
    """
    arrays: dict[str, NDArray[Any]] = {}
    end = 0
    for number, tensor in enumerate(request.inputs):
        where = f"inputs.{number}"
        if tensor.name in arrays:
            raise refused(where, f"{shown(tensor.name)} is given twice")
        size = tensor.parameters.binary_data_size
        if size is None:
            arrays[tensor.name] = _of_json(tensor, where)
        elif tail is None:
            raise refused(where, f"no bytes follow the JSON without the header {LENGTH_HEADER}")
        else:
            arrays[tensor.name] = _of_bytes(tensor, tail[end : end + size], size, where)
            end += size
    if tail is not None and end != len(tail):
        raise RequestError(400, f"{len(tail) - end} bytes follow the last tensor")
    return arrays


def _size(tensor: InputTensor, where: str) -> int:
    if any(size < 1 for size in tensor.shape):
        raise refused(f"{where}.shape", "give sizes of 1 or more")
    return math.prod(tensor.shape)


def _of_json(tensor: InputTensor, where: str) -> NDArray[Any]:
    if tensor.data is None:
        raise refused(f"{where}.data", "there is none")
    size = _size(tensor, where)
    flat: list[Any] = tensor.data
    if flat and isinstance(flat[0], list):  # nested like the shape
        for inner in tensor.shape[1:]:
            if not all(isinstance(part, list) and len(part) == inner for part in flat):
                raise refused(f"{where}.data", f"it is not nested as the shape {tensor.shape}")
            flat = list(chain.from_iterable(flat))
    if len(flat) != size:
        raise refused(f"{where}.data", f"{len(flat)} numbers; the shape {tensor.shape} has {size}")
    dtype = np.dtype(_DTYPES[tensor.datatype])
    kinds: tuple[type, ...] = {"b": (bool,), "f": (int, float)}.get(dtype.kind, (int,))
    if not all(type(value) in kinds for value in flat):
        raise refused(f"{where}.data", f"there is a value that is not of type {tensor.datatype}")
    too_large = refused(f"{where}.data", f"a number does not fit into {tensor.datatype}")
    if dtype.kind in "iu":  # some versions of numpy wrap them
        ends = np.iinfo(dtype)
        if not ends.min <= min(flat) <= max(flat) <= ends.max:
            raise too_large
    try:
        array = np.array(flat, dtype)
    except OverflowError:  # of a float
        raise too_large from None
    return array.reshape(tensor.shape)


def _of_bytes(tensor: InputTensor, content: bytes, size: int, where: str) -> NDArray[Any]:
    if tensor.data is not None:
        raise refused(f"{where}.data", "there are bytes as well")
    dtype = np.dtype(_DTYPES[tensor.datatype]).newbyteorder("<")
    expected = _size(tensor, where) * dtype.itemsize
    if not size == expected == len(content):
        raise refused(
            f"{where}.parameters.binary_data_size",
            f"{size}, {len(content)} bytes follow; {tensor.datatype} {tensor.shape} has {expected}",
        )
    if tensor.datatype == "BOOL" and any(value > 1 for value in content):
        raise refused(f"{where}.data", "a byte of BOOL is 0 or 1")
    return np.frombuffer(content, dtype).reshape(tensor.shape).astype(dtype.newbyteorder("="))


def check_room(request: InferRequest, outputs: Mapping[str, tuple[int, int]]) -> None:
    """Raise RequestError, 400, if outputs are too large for one response.

    `outputs`: for each output, the count of its numbers and the bytes of a number.
    """
    size = sum(
        count * (width if _as_bytes(request, name) else _JSON_NUMBER)
        for name, (count, width) in outputs.items()
    )
    if size > _MOST:
        raise refused(
            "outputs", f"they have about {size:,} bytes, an answer {_MOST:,}: ask for fewer rows"
        )


def answer_body(
    request: InferRequest, names: Mapping[str, str], outputs: Mapping[str, NDArray[Any]]
) -> tuple[bytes, dict[str, str]]:
    """The body of a response and its headers. `names`: the model's name and version."""
    tensors: list[dict[str, Any]] = []
    tail = []
    for name, array in outputs.items():
        found: dict[str, Any] = {
            "name": name,
            "shape": list(array.shape),
            "datatype": DATATYPES[array.dtype.name],
        }
        if _as_bytes(request, name):
            content = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
            found["parameters"] = {"binary_data_size": len(content)}
            tail.append(content)
        else:
            found["data"] = array.ravel().tolist()
        tensors.append(found)
    values: dict[str, Any] = {**names, "outputs": tensors}
    if request.id is not None:
        values["id"] = request.id
    text = json.dumps(values, allow_nan=False).encode()
    if not tail:
        return text, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(len(text))}
    return b"".join((text, *tail)), headers


def _as_bytes(request: InferRequest, name: str) -> bool:
    own = next((o.parameters.binary_data for o in request.outputs if o.name == name), None)
    return request.parameters.binary_data_output if own is None else own
