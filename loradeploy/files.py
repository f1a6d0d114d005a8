"""Files written whole or not at all, and paths that cannot leave their directory."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loradeploy.errors import BundleError, LoraDeployError, UsageError

MAX_JSON_BYTES = 16 * 1024 * 1024


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed on success and removed on failure."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, marker: str) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that takes its place on success.

    A directory that stands at `path` survives any failure, a kill included. It is replaced only
    where it is empty or holds a file named `marker`, so that a mistyped output never deletes
    somebody's files.

    Raises:
        UsageError: `path` exists and is neither empty nor of the kind that `marker` tells.
    """
    target = Path(path).absolute()
    check_replaceable(target, marker=marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = target.parent / f".{target.name}.{os.getpid()}.partial"
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            _exchange(temporary, target)
        else:
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(path: Path, *, marker: str) -> None:
    """Raise UsageError unless `path` is free, an empty directory, or one that holds `marker`."""
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise UsageError(f"{path} is a file: give the name of a directory")
    if any(path.iterdir()) and not (path / marker).is_file():
        raise UsageError(
            f"{path} is not empty and holds no {marker}: it is left alone, choose another directory"
        )


def inside(root: str | os.PathLike[str], relative: str) -> Path:
    """The path of `relative` below `root`.

    Raises:
        BundleError: `relative` is absolute or leads out of `root`, by `..` or through a link.
    """
    top = Path(root).resolve()
    path = (top / relative).resolve()
    if os.path.isabs(relative) or not path.is_relative_to(top):
        raise BundleError(f"{relative!r} leads out of {root}: only files inside it are read")
    return path


def read_json(
    path: str | os.PathLike[str], *, error: type[LoraDeployError], limit: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """The JSON object in the file `path`, of at most `limit` bytes.

    Raises:
        error: the file is missing, too large, not UTF-8, not JSON, or not an object.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        if size > limit:
            raise error(f"{file} has {size:,} bytes, more than the {limit:,} that are read")
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{file} does not exist") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{file} is not readable as JSON: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{file} holds a JSON {type(value).__name__}, an object is needed")
    return value


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as indented JSON, atomically, the same bytes for the same value."""
    with atomic_file(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            encoding="utf-8",
        )


def plain(value: Any) -> Any:
    """`value` as JSON holds it, with the same text for the same value.

    Dataclasses and mappings become objects, the latter in the order of their names; numbers that
    are not finite become null.
    """
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(value[name]) for name in sorted(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writers of `target` left behind; those still alive keep theirs."""
    for leftover in target.parent.glob(f".{target.name}.*.partial"):
        owner = leftover.name.removeprefix(f".{target.name}.").removesuffix(".partial")
        if owner.isdigit() and (int(owner) == os.getpid() or not _alive(int(owner))):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(process: int) -> bool:
    if sys.platform == "win32":  # there is no signal 0; keep what may be in use
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _exchange(new: Path, old: Path) -> None:
    """Let `new` and `old` trade places: at no moment is there no directory at `old`."""
    if sys.platform == "linux":
        at_fdcwd, rename_exchange = -100, 2
        libc = ctypes.CDLL(None, use_errno=True)
        renameat2 = getattr(libc, "renameat2", None)
        if renameat2 is not None:
            source, target = os.fsencode(new), os.fsencode(old)
            if renameat2(at_fdcwd, source, at_fdcwd, target, rename_exchange) == 0:
                return
    # Elsewhere two renames: a kill between them leaves the old directory under the spare name.
    spare = old.with_name(f".{old.name}.{os.getpid()}.old")
    os.rename(old, spare)
    os.rename(new, old)
    os.rename(spare, new)
