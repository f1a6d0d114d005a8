"""Read the adapters of llama.cpp: GGUF files, little-endian, versions 2 and 3.

"GGUF", version u32, tensors u64, values u64
values    name, type u32, value          a name is a length u64 and UTF-8
tensors   name, n u32, n sizes u64 (the last axis first), type u32, offset u64
data      at a multiple of general.alignment (32); tensors at such offsets, without overlap

The specification is docs/gguf.md of ggml-org/ggml. Everything is checked against the size of the
file before it is used. Only files of adapters are read into memory.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.errors import AdapterError, first_line, shortened, shown
from loradeploy.files import open_file
from loradeploy.snapshot import read_still

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIX: Final = ".gguf"
_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_KIND: Final = "general.type"
_ALIGNMENT: Final = "general.alignment"
_MOST: Final = 1_000_000  # values, tensors
_MOST_LETTERS: Final = 1 << 24
_MOST_AXES: Final = 4

_NUMBERS: Final = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?")))
_NUMBERS.update({10: "Q", 11: "q", 12: "d"})
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class _Kind:
    """A type of tensors: blocks of `values` values in `size` bytes, decoded to floating point."""

    values: int
    size: int
    decode: Callable[[NDArray[np.uint8]], NDArray[Any]]


def _of_bf16(raw: NDArray[np.uint8]) -> NDArray[Any]:
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _of_q8(raw: NDArray[np.uint8]) -> NDArray[Any]:
    blocks = raw.reshape(-1, 34)  # a float16 scale and 32 integers
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return scales * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)


_KINDS: Final = {
    0: _Kind(1, 4, lambda raw: raw.view("<f4")),
    1: _Kind(1, 2, lambda raw: raw.view("<f2")),
    8: _Kind(32, 34, _of_q8),
    30: _Kind(1, 2, _of_bf16),
}


def read_gguf(path: Path) -> tuple[dict[str, NDArray[Any]], Mapping[str, Any]]:
    """The finite arrays, with the last axis last, and the values of the adapter `path`.

    Raises:
        AdapterError: not a valid GGUF file, not an adapter, or a type that is not supported.
    """
    try:
        with open_file(path, error=AdapterError) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            found = _header(file, size).values.get(_KIND)
        if found != "adapter":
            raise AdapterError(f"{path} is not an adapter but a GGUF file of a {shown(found)}")
        content = read_still(path, path.read_bytes)
        header = _header(io.BytesIO(content), len(content))
        data = np.frombuffer(content, np.uint8)[header.start :]
        arrays = {name: _array(name, entry, data) for name, entry in header.tensors.items()}
    except (OSError, ValueError, OverflowError, struct.error) as problem:  # truncated meanwhile
        raise AdapterError(f"{path} is not a valid GGUF file: {first_line(problem)}") from None
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise AdapterError(f"{path}: {name} has values that are not finite (NaN or infinite)")
    return arrays, header.values


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    kind: _Kind
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) // self.kind.values * self.kind.size


@dataclass(frozen=True)
class _Header:
    """The values and the tensors of a file, and where its data start."""

    values: Mapping[str, Any]
    tensors: Mapping[str, _Tensor]
    start: int


class _Reader:
    """Reads numbers and names; ValueError if the file ends before."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def bytes(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError(f"it ends {count - self._left} bytes too early")
        self._left -= count
        return self._file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def count(self, most: int, what: str) -> int:
        found: int = self.number("Q")
        if found > most:
            raise ValueError(f"it has {found} {what}")
        return found

    def name(self) -> str:
        return self.bytes(self.count(_MOST_LETTERS, "bytes in a name")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.name()
        if kind not in _NUMBERS:
            raise ValueError(f"a value has the type {kind}")
        return self.number(_NUMBERS[kind])

    def values(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if count > self._left:
            raise ValueError(f"a list has {count} values")
        if kind in _NUMBERS:
            code = f"<{count}{_NUMBERS[kind]}"
            return list(struct.unpack(code, self.bytes(struct.calcsize(code))))
        return [self.value(kind) for _ in range(count)]


def _header(file: IO[bytes], size: int) -> _Header:
    reader = _Reader(file, size)
    if reader.bytes(4) != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.number("I")
    if version not in _VERSIONS:
        big = ", or it is big-endian" if version & 0xFFFF == 0 else ""
        raise ValueError(f"its version is {version}, versions 2 and 3 are supported{big}")
    tensor_count, count = reader.count(_MOST, "tensors"), reader.count(_MOST, "values")
    values: dict[str, Any] = {}
    for _ in range(count):
        name, kind = reader.name(), reader.number("I")
        if name in values:
            raise ValueError(f"{shown(name)} is given twice")
        values[name] = reader.values() if kind == _ARRAY else reader.value(kind)
    if values.get(_KIND) != "adapter":
        return _Header(values, {}, 0)
    tensors: dict[str, _Tensor] = {}
    alignment = values.get(_ALIGNMENT, 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise ValueError(f"{_ALIGNMENT} is {shown(alignment)}")
    for _ in range(tensor_count):
        name = reader.name()
        if name in tensors:
            raise ValueError(f"{shown(name)} is given twice")
        tensors[name] = _tensor(name, reader, alignment)
    start = -(-file.tell() // alignment) * alignment
    _check_places(tensors, size - start)
    return _Header(values, tensors, start)


def _tensor(name: str, reader: _Reader, alignment: int) -> _Tensor:
    axes = reader.number("I")
    if not 0 < axes <= _MOST_AXES:
        raise ValueError(f"{shortened(name)} has {axes} axes")
    sizes = [reader.number("Q") for _ in range(axes)]
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in _KINDS:
        raise ValueError(
            f"{shortened(name)} has the type {kind}: convert the adapter again with"
            " convert_lora_to_gguf.py --outtype f32"
        )
    if sizes[0] % _KINDS[kind].values or offset % alignment:
        raise ValueError(f"{shortened(name)} has sizes {sizes} at {offset}")
    return _Tensor(tuple(reversed(sizes)), _KINDS[kind], offset)


def _check_places(tensors: Mapping[str, _Tensor], size: int) -> None:
    """Raise ValueError unless all tensors are inside the data, without overlap."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].offset):
        if entry.offset < end or entry.offset + entry.size > size:
            raise ValueError(f"{shortened(name)} overlaps another tensor or the end of the file")
        end = entry.offset + entry.size


def _array(name: str, entry: _Tensor, data: NDArray[np.uint8]) -> NDArray[Any]:
    raw = data[entry.offset : entry.offset + entry.size].copy()  # aligned
    return entry.kind.decode(raw).reshape(entry.shape)
