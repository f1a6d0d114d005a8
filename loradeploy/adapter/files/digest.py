"""Digests that identify adapters and base models."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.files.base_files import base_tensors
from loradeploy.errors import BundleError
from loradeploy.files import open_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PREFIX = "sha256:"


def tensors_digest(tensors: Mapping[str, NDArray[Any]], numbers: Mapping[str, float]) -> str:
    """Digest of named tensors and named numbers, independent of their order.

    Tensors are hashed as float32, so that equal values stored as float16 and as float32 have the
    same digest.
    """
    digest = hashlib.sha256()
    for name in sorted(numbers):
        digest.update(f"{name}=".encode() + struct.pack("<d", numbers[name]))
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name], dtype=np.float32)
        digest.update(f"\n{name}{list(values.shape)}:".encode())
        digest.update(values.data)
    return _PREFIX + digest.hexdigest()


def base_digest(model: str | Path) -> str:
    """Digest of the base model in the directory `model`.

    Hashes name, dtype, shape and bytes, in name order, of all tensors that transformers would load.
    Sharding and other files of the directory do not affect it.

    Raises:
        ModelError: the directory has no readable safetensors files.
    """
    tensors = base_tensors(Path(model))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name}:{tensor.dtype}{list(tensor.shape)}:".encode())
        digest.update(tensor.raw.data)
    return _PREFIX + digest.hexdigest()


def file_digest(path: str | Path) -> str:
    """Digest of a file's bytes."""
    digest = hashlib.sha256()
    with open_file(path, error=BundleError) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return _PREFIX + digest.hexdigest()


def bytes_digest(content: bytes) -> str:
    """Digest of bytes, equal to the `file_digest` of a file with these contents."""
    return _PREFIX + hashlib.sha256(content).hexdigest()


def short(digest: str | None) -> str:
    """The first characters of a digest, for messages."""
    return "unknown" if digest is None else digest.removeprefix(_PREFIX)[:12]
