"""A cheap fingerprint of a large file: its size, and pieces of it at even distances.

A whole digest of gigabytes takes seconds; this one reads 1/128 of them. It tells one export's data
file from another's, a merge of one adapter from that of another, and a copy that is not complete.
It does not find a change of a few bytes, as a whole digest does, which a certificate asks for.
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
_WHOLE: Final = 1 << 22  # bytes up to which all of a file is read
_PREFIX: Final = "sampled-sha256:"


def fingerprint(content: memoryview) -> str:
    """The fingerprint of the bytes `content`."""
    return _sampled(len(content), lambda start, stop: content[start:stop])


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """The fingerprint of the file `path`; the pieces alone are read.

    Raises:
        BundleError: it cannot be read.
    """
    with open_file(path, error=BundleError) as file:

        def piece(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        return _sampled(os.fstat(file.fileno()).st_size, piece)


def _sampled(size: int, piece: Callable[[int, int], bytes | memoryview]) -> str:
    """The fingerprint of `size` bytes, of which `piece` gives those from a start to a stop."""
    digest = hashlib.sha256(f"{size}:".encode())
    if size <= _WHOLE:
        digest.update(piece(0, size))
    else:
        for start in (*range(0, size, _STEP), size - _PIECE):
            digest.update(piece(start, min(start + _PIECE, size)))
    return _PREFIX + digest.hexdigest()
