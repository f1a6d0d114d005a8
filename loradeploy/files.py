"""Read untrusted files safely. writing.py writes files.

Only regular files are read, also through links: reading a FIFO, a socket or a device might never
end. The size is checked before anything is read. Libraries that open a file by its path get it
after `check_file`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from loradeploy.errors import BundleError, LoraDeployError, first_line, shown
from loradeploy.parsing import parse_json
from loradeploy.paths import resolved
from loradeploy.printable import as_json
from loradeploy.writing import _exchange as _exchange
from loradeploy.writing import (
    atomic_directory,
    atomic_file,
    check_keeps_inputs,
    check_replaceable,
    check_replaceable_file,
    check_writable,
)

__all__ = [
    "MAX_GRAPH_BYTES",
    "MAX_JSON_BYTES",
    "MAX_TEXT_BYTES",
    "MAX_WEIGHTS_BYTES",
    "UNREAD_FILES",
    "atomic_directory",
    "atomic_file",
    "check_directory",
    "check_file",
    "check_keeps_inputs",
    "check_replaceable",
    "check_replaceable_file",
    "check_writable",
    "copy_file",
    "inside",
    "is_json_lines",
    "json_line",
    "json_object",
    "json_text",
    "json_values",
    "numbered_lines",
    "open_file",
    "read_bytes",
    "read_json",
    "read_text",
    "write_json",
]

MAX_JSON_BYTES: Final = 16 << 20
_JSON_LINES: Final = (".jsonl", ".ndjson", ".json")
# Files that are neither lines of text nor JSONL, by the endings of their names: tables and archives
# that nothing here reads.
UNREAD_FILES: Final = frozenset(
    (".tsv", ".xls", ".xlsx", ".arrow", ".feather", ".gz", ".bz2", ".xz", ".zst", ".zip")
)
MAX_TEXT_BYTES: Final = 1 << 30  # prompts and data, which are read into memory
MAX_GRAPH_BYTES: Final = 2 << 30  # the limit of protobuf and flatbuffers
MAX_WEIGHTS_BYTES: Final = 1 << 40  # for files that are mapped, or read after other checks

# O_NONBLOCK: do not wait for the writer of a FIFO. Windows lacks it, and needs O_BINARY.
_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_file(
    path: str | os.PathLike[str], *, error: type[LoraDeployError], limit: int = MAX_WEIGHTS_BYTES
) -> int:
    """The size of the file `path` in bytes. Call it before a library opens the file by its path.

    Raises:
        error: the file is missing, not a regular file, or has more bytes than `limit`.
    """
    try:
        return _checked(
            os.stat(path), path, error, limit
        )  # before opening, which has effects for some devices
    except (OSError, ValueError) as problem:
        _refuse(path, problem, error)


def check_directory(
    directory: str | os.PathLike[str], *, error: type[LoraDeployError], deep: bool = False
) -> None:
    """Apply `check_file` to the files in `directory`, because libraries may open any of them.

    `deep`: include subdirectories.

    Raises:
        error: an entry is neither a regular file nor a directory; broken links are ignored.
    """
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as problem:
        _refuse(directory, problem, error)
    for entry in entries:
        try:
            mode = entry.stat().st_mode
        except (OSError, ValueError):
            continue
        if not stat.S_ISDIR(mode):
            check_file(entry.path, error=error)
        elif deep and not entry.is_symlink():
            check_directory(entry.path, error=error, deep=True)


def copy_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    error: type[LoraDeployError],
    limit: int = MAX_WEIGHTS_BYTES,
) -> None:
    """Copy the bytes of the file `source`, at most `limit`, to `target`.

    Raises:
        error: as `check_file`. OSError: it cannot be written.
    """
    check_file(source, error=error, limit=limit)
    shutil.copyfile(source, target)


def open_file(
    path: str | os.PathLike[str], *, error: type[LoraDeployError], limit: int = MAX_WEIGHTS_BYTES
) -> BinaryIO:
    """The file `path`, open for reading bytes.

    Raises:
        error: as `check_file`, or it may not be read.
    """
    check_file(path, error=error, limit=limit)
    try:
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError) as problem:
        _refuse(path, problem, error)
    try:
        _checked(os.fstat(descriptor), path, error, limit)  # it may have been replaced meanwhile
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(
    path: str | os.PathLike[str], *, error: type[LoraDeployError], limit: int = MAX_JSON_BYTES
) -> bytes:
    """The contents of the file `path`, of at most `limit` bytes.

    Raises:
        error: as `open_file`, or it cannot be read.
    """
    with open_file(path, error=error, limit=limit) as file:
        try:
            # Not more than its size when it was checked.
            return file.read(os.fstat(file.fileno()).st_size)
        except OSError as problem:
            _refuse(path, problem, error)


def read_text(
    path: str | os.PathLike[str],
    *,
    error: type[LoraDeployError],
    limit: int = MAX_JSON_BYTES,
    encoding: str = "utf-8",
    errors: str = "strict",
) -> str:
    """The text in the file `path`, of at most `limit` bytes; all line ends become newlines.

    Raises:
        error: as `read_bytes`, or it is not in this encoding.
    """
    content = read_bytes(path, error=error, limit=limit)
    try:
        text = content.decode(encoding, errors)
    except UnicodeDecodeError as problem:
        raise error(
            f"{os.fspath(path)} cannot be read: it is not UTF-8 (byte {problem.start})"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _checked(
    found: os.stat_result,
    path: str | os.PathLike[str],
    error: type[LoraDeployError],
    limit: int,
) -> int:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "no file")
        raise error(f"{os.fspath(path)} is {kind}: only regular files are read")
    if found.st_size > limit:
        raise error(
            f"{os.fspath(path)} has {found.st_size:,} bytes, more than the {limit:,} that are read"
        )
    return found.st_size


def _refuse(
    path: str | os.PathLike[str], problem: Exception, error: type[LoraDeployError]
) -> NoReturn:
    """Raise `error` for a failed system call on `path`."""
    name = os.fspath(path)
    if isinstance(problem, ValueError):  # a null byte
        raise error(f"{shown(name)} is not a file path") from None
    if isinstance(problem, FileNotFoundError | NotADirectoryError):
        raise error(f"{name} does not exist") from None
    reason = problem.strerror if isinstance(problem, OSError) else None
    raise error(f"{name} cannot be read: {reason or first_line(problem)}") from None


def inside(root: str | os.PathLike[str], relative: str) -> Path:
    """The path of `relative` below `root`; in a snapshot of the Hugging Face cache, of its content.

    Raises:
        BundleError: `relative` is absolute, leads outside `root` by `..` or a link, or is not a
            valid path.
    """
    top = resolved(root)
    try:
        path = (top / relative).resolve()
        path.is_file()  # raises if a name is too long
    except (OSError, RuntimeError, ValueError):  # a null byte, links in a circle
        raise BundleError(f"{shown(relative)} is not a file path in {root}") from None
    below = path.is_relative_to(top)
    if not below and (contents := _cached_contents(top)) is not None:
        lexical = Path(os.path.normpath(top / relative))
        below = lexical.is_relative_to(top) and path.is_relative_to(contents)
    if os.path.isabs(relative) or not below:
        raise BundleError(f"{shown(relative)} is outside {root}: only files inside it are read")
    return path


def _cached_contents(top: Path) -> Path | None:
    """Where the links of a snapshot in the Hugging Face cache lead; None if `top` is in none.

    The cache has models--OWNER--NAME/snapshots/REVISION/FILE, links to ../../blobs/DIGEST.
    """
    for folder in (top, *top.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.parent.parent / "blobs"
    return None


def read_json(
    path: str | os.PathLike[str],
    *,
    error: type[LoraDeployError],
    limit: int = MAX_JSON_BYTES,
    finite: bool = True,
) -> dict[str, Any]:
    """The JSON object in the file `path`, of at most `limit` bytes.

    `finite`: whether to refuse infinite numbers and NaN, which model configs may have.

    Raises:
        error: the file is missing, too large, not JSON by `parse_json`, or not an object.
    """
    content = read_bytes(path, error=error, limit=limit)
    return json_object(content, path, error=error, finite=finite)


def optional_json(path: str | os.PathLike[str], *, error: type[LoraDeployError]) -> dict[str, Any]:
    """As `read_json`; empty if nothing is at `path`. What is no regular file is refused."""
    return read_json(path, error=error) if os.path.exists(path) else {}


def json_object(
    content: bytes,
    path: str | os.PathLike[str],
    *,
    error: type[LoraDeployError],
    finite: bool = True,
) -> dict[str, Any]:
    """The JSON object in `content`, read from the file `path`; see `read_json`."""
    file = Path(path)
    try:
        value = parse_json(content, finite=finite)
    except ValueError as problem:
        raise error(f"{file} is not readable as JSON: {first_line(problem)}") from None
    if not isinstance(value, dict):
        raise error(f"{file} has a JSON {type(value).__name__}, expected an object")
    return value


def is_json_lines(path: str | os.PathLike[str]) -> bool:
    """Whether each line of the text file `path` is JSON, by the ending of its name."""
    return Path(path).suffix.lower() in _JSON_LINES


def numbered_lines(text: str, source: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """The lines of `text` that are not blank, each with its location, `SOURCE, line N`.

    Only a newline ends a line: JSON may contain Unicode line separators.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{os.fspath(source)}, line {number}", line.rstrip("\r")


def json_line(
    where: str, line: str, *, error: type[LoraDeployError], finite: bool = True, expected: str
) -> Any:
    """The JSON value of one `line` of a file; `where` and `expected` are for the message.

    Raises:
        error: it is not JSON.
    """
    try:
        return parse_json(line, finite=finite)
    except ValueError as problem:
        raise error(f"{where}: not JSON ({first_line(problem)}); {expected}") from None


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as indented JSON, atomically. Equal values give equal bytes."""
    with atomic_file(path) as temporary:
        temporary.write_text(json_text(value), encoding="utf-8")


def json_text(value: object) -> str:
    """`value` as indented JSON. Equal values give equal texts."""
    return as_json(value, indent=2, allow_nan=False) + "\n"


def json_values(value: Any) -> Any:
    """`value` converted to types of JSON; equal values give the same text.

    Dataclasses and mappings become objects, mappings sorted by name; paths become strings, numbers
    that are not finite null.
    """
    if dataclasses.is_dataclass(value):
        return {f.name: json_values(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: json_values(value[name]) for name in sorted(value)}
    if isinstance(value, tuple | list):
        return [json_values(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
