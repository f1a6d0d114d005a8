"""A graph without the defaults of its side inputs, for providers that want every input to be fed.

In ONNX's file format a default is an initializer that has the name of a graph input. So only those
entries are left out, and all else stays byte for byte: no library of ONNX is needed, and the graph
is the one whose digest was compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from loradeploy.errors import BundleError

# Fields of ModelProto, GraphProto and TensorProto, and the wire types of protobuf.
_GRAPH, _INITIALIZER, _NAME = 7, 5, 8
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES: Final = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT: Final = 10


def without_defaults(model: bytes, names: Collection[str]) -> bytes:
    """The ONNX `model` with every initializer of the main graph left out that is in `names`.

    Raises:
        BundleError: it is no ONNX model.
    """
    left_out = {name.encode() for name in names}
    view = memoryview(model)
    parts: list[bytes | memoryview] = []
    for number, whole, content in _fields(view):
        if number != _GRAPH or content is None:
            parts.append(whole)
            continue
        kept = [
            field
            for inner, field, value in _fields(content)
            if not (inner == _INITIALIZER and value is not None and _name(value) in left_out)
        ]
        size = sum(len(field) for field in kept)
        parts += [_varint(_GRAPH << 3 | _BYTES), _varint(size), *kept]
    return b"".join(parts)


def _name(tensor: memoryview) -> bytes:
    names = [bytes(v) for number, _, v in _fields(tensor) if number == _NAME and v is not None]
    return names[-1] if names else b""


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview | None]]:
    """The fields of a message: number, all bytes, and the content where it is bytes."""
    at = 0
    while at < len(message):
        begin = at
        key, at = _read_varint(message, at)
        kind, content = key & 7, None
        if kind == _VARINT:
            _, at = _read_varint(message, at)
        elif kind == _BYTES:
            size, at = _read_varint(message, at)
            content = message[at : at + size]
            at += size
        elif kind in _FIXED_SIZES:
            at += _FIXED_SIZES[kind]
        else:
            raise _broken()
        if at > len(message):
            raise _broken()
        yield key >> 3, message[begin:at], content


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(message[at : at + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise _broken()


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _broken() -> BundleError:
    return BundleError("the graph is no ONNX model: export again")
