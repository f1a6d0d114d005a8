"""Edit and read serialized ONNX models without an ONNX library, for providers that need it.

A default is an initializer with the name of a graph input; without it, the input must be fed. All
other bytes are unchanged, so that the graph is the one whose digest was compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from loradeploy.errors import BundleError

# Fields of ModelProto, GraphProto, TensorProto, NodeProto and AttributeProto.
_GRAPH, _NODE, _INITIALIZER, _TENSOR_NAME = 7, 1, 5, 8
_NODE_NAME, _OPERATOR, _ATTRIBUTE, _ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 3, 4, 5, 6, 11
# The wire types of protobuf.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES: Final = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT: Final = 10


def without_defaults(model: bytes, names: Collection[str]) -> bytes:
    """The ONNX `model` without the initializers of the main graph that are in `names`.

    Raises:
        BundleError: it is not an ONNX model.
    """
    left_out = set(names)
    view = memoryview(model)
    parts: list[bytes | memoryview] = []
    for number, whole, content in _fields(view):
        if number != _GRAPH or content is None:
            parts.append(whole)
            continue
        kept = [
            field
            for inner, field, value in _fields(content)
            if not (
                inner == _INITIALIZER
                and value is not None
                and _text(value, _TENSOR_NAME) in left_out
            )
        ]
        size = sum(len(field) for field in kept)
        parts += [_varint(_GRAPH << 3 | _BYTES), _varint(size), *kept]
    return b"".join(parts)


def node_names(model: bytes, operators: Collection[str]) -> list[str]:
    """The names of the nodes of `operators` in the ONNX `model`, including those in branches.

    Raises:
        BundleError: it is not an ONNX model, or one of the nodes has no name.
    """
    found: list[str] = []
    for number, _, content in _fields(memoryview(model)):
        if number == _GRAPH and content is not None:
            _add_names(content, operators, found)
    if "" in found:
        raise BundleError(
            f"a node of {' or '.join(operators)} in the graph has no name, by which it could be"
            " kept off the device: export again, or use another provider"
        )
    return found


def _add_names(graph: memoryview, operators: Collection[str], found: list[str]) -> None:
    for number, _, node in _fields(graph):
        if number != _NODE or node is None:
            continue
        if _text(node, _OPERATOR) in operators:
            found.append(_text(node, _NODE_NAME))
        for inner, _, attribute in _fields(node):
            if inner != _ATTRIBUTE or attribute is None:
                continue
            for field, _, value in _fields(attribute):
                if field in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS) and value is not None:
                    _add_names(value, operators, found)


def _text(message: memoryview, field: int) -> str:
    """The last value of a string field, which is the one that counts; "" if there is none."""
    values = [v for number, _, v in _fields(message) if number == field and v is not None]
    return bytes(values[-1]).decode(errors="replace") if values else ""


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview | None]]:
    """Yield the number, the bytes, and the content (if length-delimited) of a message's fields."""
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
    return BundleError("the graph is not an ONNX model: export again")
