"""A fast fingerprint of a large file: its size, and pieces of it at regular distances.

A full digest of gigabytes takes seconds; the fingerprint reads 1/128 of the file. It distinguishes
the data files of two exports, the merges of two adapters, and an incomplete copy. It does not
detect a change of a few bytes; certificates use the full digest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Final

from loradeploy.errors import BundleError
from loradeploy.files import open_file

_STEP: Final = 1 << 16
_PIECE: Final = 1 << 9
_SMALL: Final = 1 << 22  # files up to this size are read completely
_PREFIX: Final = "sampled-sha256:"


def fingerprint(content: memoryview) -> str:
    """The fingerprint of the bytes `content`."""
    return _sampled(len(content), lambda start, stop: content[start:stop])


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """The fingerprint of the file `path`; only the pieces are read.

    Raises:
        BundleError: it cannot be read.
    """
    with open_file(path, error=BundleError) as file:

        def piece(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        return _sampled(os.fstat(file.fileno()).st_size, piece)


def _sampled(size: int, piece: Callable[[int, int], bytes | memoryview]) -> str:
    """The fingerprint of `size` bytes. `piece(start, stop)` returns a part of them."""
    digest = hashlib.sha256(f"{size}:".encode())
    if size <= _SMALL:
        digest.update(piece(0, size))
    else:
        for start in (*range(0, size, _STEP), size - _PIECE):
            digest.update(piece(start, min(start + _PIECE, size)))
    return _PREFIX + digest.hexdigest()
