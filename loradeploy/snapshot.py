"""Whether files are still those that were looked at: their places on disk, sizes and times.

A directory that is read file by file is one thing only if nobody writes to it meanwhile. A snapshot
is taken before the first file is read and compared after the last. It costs a stat a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_ATTEMPTS: Final = 3


@dataclass(frozen=True)
class FileState:
    """What the system tells of a file: which one it is, its size, when it was written.

    `touched` is when anything of it changed (ctime): no writer can set it, but a new link to the
    file or other permissions change it too.
    """

    device: int
    inode: int
    size: int
    written: int
    touched: int

    @classmethod
    def of(cls, file: str | os.PathLike[str] | int) -> FileState | None:
        """The state of the file at a path or a descriptor; None where there is none."""
        try:
            found = os.stat(file)
        except (OSError, ValueError):
            return None
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def same(self, other: FileState | None, *, strict: bool) -> bool:
        """Whether `other` is of the same contents; `strict` counts `touched` too."""
        if other is None:
            return False
        mine = (self.device, self.inode, self.size, self.written)
        theirs = (other.device, other.inode, other.size, other.written)
        return mine == theirs and (not strict or self.touched == other.touched)


@dataclass(frozen=True)
class Snapshot:
    """The states of files in `directory`, by their paths below it; None where there is no file."""

    directory: Path
    files: Mapping[str, FileState | None]

    @classmethod
    def take(cls, directory: Path) -> Snapshot:
        """The states of all files below `directory` as they are now."""
        names = []
        for place, _, files in os.walk(directory):
            names += [os.path.relpath(os.path.join(place, file), directory) for file in files]
        return cls.of(directory, (name.replace(os.sep, "/") for name in names))

    @classmethod
    def of(cls, directory: Path, names: Iterable[str]) -> Snapshot:
        """The states of the files `names` of `directory` as they are now, there or not."""
        return cls(directory, {name: FileState.of(directory / name) for name in sorted(names)})

    def changed(
        self, wanted: Callable[[str], bool] = lambda name: True, *, strict: bool = False
    ) -> str | None:
        """The first of the files that are `wanted` that is not what it was; None where all are.

        `strict`: also where only its times were set back, or a link to it was made.
        """
        for name, then in self.files.items():
            if not wanted(name):
                continue
            now = FileState.of(self.directory / name)
            if not (now is None if then is None else then.same(now, strict=strict)):
                return name
        return None


def read_still(path: str | os.PathLike[str], content: Callable[[], bytes]) -> bytes:
    """What `content` reads of the file `path`, which nobody wrote to meanwhile.

    Raises:
        OSError: somebody did, at each of several attempts.
    """
    for _ in range(_ATTEMPTS):
        before = FileState.of(path)
        found = content()
        if before is None or (
            len(found) == before.size and before.same(FileState.of(path), strict=True)
        ):
            return found
    raise OSError("it is being written to: try again once it is whole")
