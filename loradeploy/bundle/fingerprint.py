"""A cheap fingerprint of a large file: its size, and pieces of it at even distances.

A whole digest of gigabytes takes seconds; this one reads 1/128 of them. It tells one export's data
file from another's, a merge of one adapter from that of another, and a copy that is not complete.
It does not find a change of a few bytes, as a whole digest does, which a certificate asks for.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final

from loradeploy.errors import BundleError
from loradeploy.files import open_file

_STEP: Final = 1 << 16
_PIECE: Final = 1 << 9
_WHOLE: Final = 1 << 22  # bytes up to which all of a file is read
_PREFIX: Final = "sampled-sha256:"


def fingerprint(content: memoryview) -> str:
    """The fingerprint of the bytes `content`."""
    size = len(content)
    digest = hashlib.sha256(f"{size}:".encode())
    if size <= _WHOLE:
        digest.update(content)
    else:
        for start in range(0, size, _STEP):
            digest.update(content[start : start + _PIECE])
        digest.update(content[-_PIECE:])
    return _PREFIX + digest.hexdigest()


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """The fingerprint of the file `path`; the pieces alone are read.

    Raises:
        BundleError: it cannot be read.
    """
    size = os.path.getsize(path)
    digest = hashlib.sha256(f"{size}:".encode())
    with open_file(path, error=BundleError) as file:
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for start in (*range(0, size, _STEP), size - _PIECE):
                file.seek(start)
                digest.update(file.read(_PIECE))
    return _PREFIX + digest.hexdigest()
