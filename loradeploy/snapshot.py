"""Detect whether files changed while they were read, by inode, size and times.

A snapshot is taken before the first file of a directory is read, and compared after the last. It
costs one stat per file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from loradeploy.errors import LoraDeployError

_Read = TypeVar("_Read")

# How often files that change while they are read are read again.
ATTEMPTS: Final = 3


@dataclass(frozen=True)
class FileState:
    """Identity, size and modification time of a file.

    `touched`: time of the last change of any kind (ctime). Programs cannot set it, but new links to
    the file and changed permissions update it too.
    """

    device: int
    inode: int
    size: int
    written: int
    touched: int

    @classmethod
    def of(cls, file: str | os.PathLike[str] | int) -> FileState | None:
        """The state of the file at a path or a descriptor; None if it does not exist."""
        try:
            found = os.stat(file)
        except (OSError, ValueError):
            return None
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def same(self, other: FileState | None, *, strict: bool) -> bool:
        """Whether `other` has the same contents; `strict`: compare `touched` too."""
        if other is None:
            return False
        ours = (self.device, self.inode, self.size, self.written)
        theirs = (other.device, other.inode, other.size, other.written)
        return ours == theirs and (not strict or self.touched == other.touched)


@dataclass(frozen=True)
class Snapshot:
    """The states of files in `directory`, by relative path; None if a file does not exist."""

    directory: Path
    files: Mapping[str, FileState | None]

    @classmethod
    def take(cls, directory: Path) -> Snapshot:
        """The current states of all files below `directory`."""
        names = []
        for parent, _, files in os.walk(directory):
            names += [os.path.relpath(os.path.join(parent, file), directory) for file in files]
        return cls.of(directory, (name.replace(os.sep, "/") for name in names))

    @classmethod
    def of(cls, directory: Path, names: Iterable[str]) -> Snapshot:
        """The current states of the files `names` of `directory`, which may not exist."""
        return cls(directory, {name: FileState.of(directory / name) for name in sorted(names)})

    def changed(
        self, include: Callable[[str], bool] = lambda name: True, *, strict: bool = False
    ) -> str | None:
        """The first changed file of those that `include` selects; None if none changed.

        `strict`: also report a file whose modification time was restored, or that was linked.
        """
        for name, before in self.files.items():
            if not include(name):
                continue
            now = FileState.of(self.directory / name)
            if not (now is None if before is None else before.same(now, strict=strict)):
                return name
        return None


def of_one_version(
    source: str | os.PathLike[str],
    states: Callable[[], Snapshot],
    read: Callable[[], _Read],
    error: type[LoraDeployError],
) -> _Read:
    """The result of `read`, during which none of the files in `states` changed.

    One file of one version might fit another file of the next. `source`: the name of the files in
    the message.

    Raises:
        error: as `read`, or the files changed during each of several attempts.
    """
    for _ in range(ATTEMPTS):
        before = states()
        try:
            found = read()
        except error:
            if states() == before:
                raise
        else:
            if states() == before:
                return found
    raise error(
        f"{os.fspath(source)} was written to while it was read: try again when it is complete"
    )


def read_still(path: str | os.PathLike[str], content: Callable[[], bytes]) -> bytes:
    """The result of `content`, which reads the file `path`, if the file did not change meanwhile.

    Raises:
        OSError: it changed during each of several attempts.
    """
    for _ in range(ATTEMPTS):
        before = FileState.of(path)
        found = content()
        if before is None or (
            len(found) == before.size and before.same(FileState.of(path), strict=True)
        ):
            return found
    raise OSError("it is being written to: try again when it is complete")
