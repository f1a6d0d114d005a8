"""Identities: what an adapter computes, and which weights a base model has."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.base_files import base_tensors
from loradeploy.errors import BundleError
from loradeploy.files import open_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PREFIX = "sha256:"


def tensors_digest(tensors: Mapping[str, NDArray[Any]], numbers: Mapping[str, float]) -> str:
    """Digest of named tensors and named numbers, whatever their order.

    Floating-point tensors count by value, widened to float32, so that the same numbers stored as
    float16 and as float32 have one identity.
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
    """Identity of the base model in the directory `model`: a digest of its checkpoint's tensors.

    Names, dtypes, shapes and bytes, in name order, of all tensors that transformers would load:
    how they are sharded, and everything else in the directory, does not matter.

    Raises:
        ModelError: the directory holds no readable safetensors.
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
    """Digest of bytes, as `file_digest` of a file that holds them."""
    return _PREFIX + hashlib.sha256(content).hexdigest()


def short(digest: str | None) -> str:
    """The first characters of a digest, for messages."""
    return "unknown" if digest is None else digest.removeprefix(_PREFIX)[:12]
