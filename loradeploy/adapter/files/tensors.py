"""Read and write safetensors files. Files are validated before their data is used.

The `safetensors` library checks the header (length, JSON, dtypes, offsets without gaps or overlap,
size of the file). Adapters are read into memory and checked there: if another process truncates a
mapped file, this process dies (SIGBUS), and if it writes to one, the data changes after the check.
Only the weights of a base model, which are large and read once, are mapped. bfloat16 and, in
adapters, float8, which numpy lacks, are converted to float32.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.errors import LoraDeployError, first_line, shortened, shown
from loradeploy.files import atomic_file, check_file, open_file
from loradeploy.parsing import parse_json
from loradeploy.snapshot import read_still

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items() if name != "BF16"}
_POINTER = b"version https://git-lfs"
_HEADER_LENGTH = np.dtype("<u8")
# The maximum number of dimensions (before numpy 2) and of bytes of a numpy array.
_MAX_RANK = 32
_MAX_SIZE = 2**59


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a safetensors file: `raw` is its bytes, `dtype` the file's name for them."""

    dtype: str
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]

    def take(self, picks: list[int], axis: int) -> NDArray[Any]:
        """The values of `array` at the indices `picks` of one axis. Only these are read."""
        return self._widened(self._values().take(picks, axis))

    def array(self) -> NDArray[Any]:
        """The values: a read-only view of the file, or a float32 copy of bfloat16."""
        return self._widened(self._values())

    def _values(self) -> NDArray[Any]:
        if self.dtype not in _DTYPES:
            raise LoraDeployError(f"a tensor has the dtype {self.dtype}, which is not supported")
        return self.raw.view(_DTYPES[self.dtype]).reshape(self.shape)

    def _widened(self, values: NDArray[Any]) -> NDArray[Any]:
        if self.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values


def map_tensors(
    path: str | os.PathLike[str], *, error: type[LoraDeployError]
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors, mapped, and the metadata of the safetensors file `path`.

    For files that do not change meanwhile; otherwise use `read_tensors`.

    Raises:
        error: the file is missing, truncated, or its header contradicts its contents.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    check_file(file, error=error)
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = dict(opened.metadata() or {})
        mapped = np.memmap(file, dtype=np.uint8, mode="r")
    except (OSError, SafetensorError, ValueError) as problem:
        raise error(_unreadable(file, problem)) from None
    start = int(mapped[:8].view(_HEADER_LENGTH)[0]) + 8
    try:
        header: dict[str, Any] = parse_json(bytes(mapped[8:start]))
        header.pop("__metadata__", None)
        tensors = {name: _stored(name, entry, mapped[start:]) for name, entry in header.items()}
    except ValueError as problem:
        raise error(_unreadable(file, problem)) from None
    return tensors, metadata


def read_tensors(
    path: str | os.PathLike[str], *, error: type[LoraDeployError]
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors and the metadata of the safetensors file `path`, in memory.

    Later changes to the file have no effect.

    Raises:
        error: as `map_tensors`, or the file is written to while it is read.
    """
    from safetensors import SafetensorError, deserialize

    file = Path(path)
    check_file(file, error=error)
    try:
        content = read_still(file, file.read_bytes)
        # Validates everything but shapes that are too large for numpy.
        parts = dict(deserialize(content))  # type: ignore[no-untyped-call]
        start = int.from_bytes(content[:8], "little") + 8
        header: dict[str, Any] = parse_json(content[8:start])
        del content
        metadata = header.pop("__metadata__", None) or {}
        tensors = {}
        for name, described in header.items():  # in the file's order; the library has none
            data = parts[name]["data"]
            entry = {**described, "data_offsets": [0, len(data)]}
            tensors[name] = _stored(name, entry, np.frombuffer(data, np.uint8))
    except FileNotFoundError:
        raise error(f"{file} does not exist") from None
    except MemoryError:  # of a sparse file, for example
        raise error(
            f"{file} takes more memory than this process may use, for {file.stat().st_size:,} bytes"
        ) from None
    except (OSError, SafetensorError, ValueError) as problem:
        raise error(_unreadable(file, problem)) from None
    return tensors, dict(metadata)


def _stored(name: str, entry: Mapping[str, Any], data: NDArray[np.uint8]) -> StoredTensor:
    """The tensor that a header's `entry` describes; ValueError if its shape is too large for numpy.

    The library compares offsets and size, which does not bound a shape that contains a zero.
    """
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if len(shape) > _MAX_RANK or math.prod(size or 1 for size in shape) > _MAX_SIZE:
        raise ValueError(f"{shortened(name)} has the shape {shown(list(shape))}")
    return StoredTensor(dtype, shape, data[begin:end])


def _unreadable(file: Path, problem: Exception) -> str:
    """Message for a file that cannot be read."""
    if (pointer := lfs_problem(file)) is not None:
        return pointer
    if isinstance(problem, OSError):
        return f"{file} cannot be read: {problem.strerror or first_line(problem)}"
    return f"{file} is not a valid safetensors file: {first_line(problem)}"


def lfs_problem(file: Path) -> str | None:
    """The message for a Git LFS pointer in place of the data; None if `file` is none."""
    try:
        with open_file(file, error=LoraDeployError) as opened:
            is_pointer = opened.read(len(_POINTER)) == _POINTER
    except (OSError, LoraDeployError):
        return None
    return f"{file} is a pointer of Git LFS, not the file: run git lfs pull" if is_pointer else None


def read_arrays(
    path: str | os.PathLike[str], *, error: type[LoraDeployError]
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The finite arrays and the metadata of the safetensors file `path`.

    Raises:
        error: as `read_tensors`; or a dtype that is not supported, or a value that is not finite.
    """
    stored, metadata = read_tensors(path, error=error)
    arrays = {}
    for name, tensor in stored.items():
        if tensor.dtype in _FLOAT8:
            values = _FLOAT8[tensor.dtype](tensor.raw).reshape(tensor.shape)
        elif tensor.dtype in _DTYPES:
            values = np.require(tensor.array(), requirements=("ALIGNED", "WRITEABLE"))
        else:
            raise error(f"{path}: {name} has the dtype {tensor.dtype}, which is not supported")
        if values.dtype.kind == "f" and not _fit_float32(values):
            raise error(f"{path}: {name} has values that are not finite (NaN or infinite)")
        arrays[name] = values
    return arrays, metadata


def _of_e4m3(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float8_e4m3fn: 4 bits of exponent with a bias of 7, 3 of mantissa, no infinity."""
    exponent, mantissa = (raw >> 3 & 15).astype(np.int32), (raw & 7).astype(np.float32)
    scaled = np.where(exponent == 0, mantissa, mantissa + 8)
    values = np.ldexp(scaled, np.maximum(exponent, 1) - 10)
    values[raw & 127 == 127] = np.nan
    signed: NDArray[np.float32] = np.where(raw >> 7, -values, values).astype(np.float32)
    return signed


def _of_e5m2(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float8_e5m2: the upper byte of a float16."""
    upper = raw.astype(np.uint16)
    upper <<= 8
    return upper.view(np.float16).astype(np.float32)


# Only for adapters: a base's float8 weights have scales beside them.
_FLOAT8: Final = {"F8_E4M3": _of_e4m3, "F8_E5M2": _of_e5m2}


def _fit_float32(values: NDArray[Any]) -> bool:
    """Whether all values are finite as float32, in which adapters are computed."""
    if values.dtype.itemsize > 4:
        return bool((np.abs(values) <= np.finfo(np.float32).max).all())  # False for NaN
    return bool(np.isfinite(values).all())


def write_arrays(
    path: str | os.PathLike[str],
    arrays: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file atomically, see `write_tensors`."""
    with atomic_file(path) as temporary:
        write_tensors(temporary, arrays, metadata)


def write_tensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file to `path` itself. Equal contents give equal bytes.

    The library orders the metadata by hash (0.8), so the header is written here: tensors and
    metadata are in name order, and spaces pad the header to a multiple of 8 bytes.

    Raises:
        TypeError: safetensors has no such dtype.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in sorted(arrays):
        values = arrays[name]
        if values.dtype not in _NAMES:
            raise TypeError(f"{name} has the dtype {values.dtype}, which safetensors cannot store")
        header[name] = {
            "dtype": _NAMES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(np.array(len(text), _HEADER_LENGTH).tobytes())
        file.write(text)
        for name in sorted(arrays):
            file.write(np.ascontiguousarray(arrays[name]).data)
