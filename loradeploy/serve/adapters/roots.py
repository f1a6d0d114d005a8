"""Adapter roots: a directory or an object store with one adapter in each entry.

An entry is a PEFT directory, or a NAME.onnx_adapter file. Clients can only give names of entries.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from loradeploy.bundle.names import NATIVE_SUFFIX
from loradeploy.errors import (
    AdapterError,
    AdapterStoreError,
    LoraDeployError,
    UsageError,
    first_line,
)
from loradeploy.names import ADAPTER_CONFIG_NAME
from loradeploy.paths import resolved
from loradeploy.printable import logger_of
from loradeploy.serve.adapters.fetched import FetchedAdapters
from loradeploy.snapshot import Snapshot

if TYPE_CHECKING:
    from fsspec.spec import AbstractFileSystem

logger = logger_of(__name__)

# A single path component that cannot lead elsewhere.
ENTRY_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Maximum files of one adapter.
MOST_FILES: Final = 256
# Maximum components of a file's path in an adapter, such as 1_Pooling/config.json.
_MOST_DEPTH: Final = 3
# Seconds for which the state of an entry is cached, and the maximum number of cached entries.
_REFRESH: Final = 5.0
_MOST_KNOWN: Final = 4096
_CHUNK: Final = 1 << 20
# User name and password in a URL.
_USER: Final = re.compile(r"(?<=://)[^/?#\s]*@")


@dataclass(frozen=True)
class Found:
    """The state of an entry of a root; equal states have equal files.

    `state`: changes with the files. `size`: the total bytes of all files. `files`: their number.
    """

    entry: str
    state: Hashable
    size: int
    files: int


class AdapterRoot(Protocol):
    """A place where the service finds adapters by name."""

    def find(self, entry: str, *, fresh: bool = False) -> Found | None:
        """The current state of the entry, None if there is none. `fresh`: do not use cached states.

        Raises:
            AdapterError: the root cannot be read.
        """

    def local(self, found: Found) -> AbstractContextManager[Path]:
        """Yield the path of its files on this machine, valid during the context.

        Raises:
            AdapterError: they cannot be fetched, or have changed since they were found.
        """

    def has(self, found: Found) -> bool:
        """Whether its files are available without fetching."""

    def listed(self) -> list[str]:
        """The names of all entries.

        Raises:
            AdapterError: the root cannot be read.
        """

    def without_paths(self, message: str) -> str:
        """Remove the server's paths from a message to a client."""

    def close(self) -> None:
        """Release temporary files."""


class DirectoryRoot:
    """A local directory.

    Raises:
        UsageError: it is not a directory.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UsageError(
                f"{path} is not a directory: give a directory of adapters as `adapter_root`"
            )
        self.path = resolved(path)

    def find(self, entry: str, *, fresh: bool = False) -> Found | None:
        """See `AdapterRoot`; the files' states are read each time."""
        place = self._place(entry)
        if place is None:
            return None
        whole = place.is_dir()
        files = Snapshot.take(place) if whole else Snapshot.of(place.parent, [place.name])
        states = [state for state in files.files.values() if state is not None]
        key = (place, tuple(sorted(files.files.items(), key=lambda one: one[0])))
        return Found(entry, key, sum(state.size for state in states), len(files.files))

    def _place(self, entry: str) -> Path | None:
        for path in (self.path / entry, self.path / f"{entry}{NATIVE_SUFFIX}"):
            place = resolved(path)
            if not place.is_relative_to(self.path):
                continue  # a link to a place outside the root
            if place.is_dir() or (place.is_file() and place.suffix == NATIVE_SUFFIX):
                return place
        return None

    @contextmanager
    def local(self, found: Found) -> Iterator[Path]:
        """See `AdapterRoot`."""
        place = self._place(found.entry)
        if place is None:
            raise AdapterError(f"{self.path / found.entry} no longer exists")
        yield place

    def has(self, found: Found) -> bool:
        """See `AdapterRoot`."""
        return True

    def listed(self) -> list[str]:
        """See `AdapterRoot`; directories without an adapter, such as checkpoints, are left out."""
        names = set()
        for path in self.path.iterdir():
            native = path.suffix == NATIVE_SUFFIX and path.is_file()
            name = path.stem if native else path.name
            # os.path's is false, and raises nothing, for a directory that may not be read.
            if not native and not os.path.isfile(path / ADAPTER_CONFIG_NAME):
                continue
            if ENTRY_NAME.fullmatch(name) and self._place(name) is not None:
                names.add(name)
        return sorted(names)

    def without_paths(self, message: str) -> str:
        """See `AdapterRoot`."""
        return message.replace(f"{self.path}/", "")

    def close(self) -> None:
        """See `AdapterRoot`."""


class StoreRoot:
    """A folder of an object store that fsspec can open, such as s3://bucket/adapters.

    Entries are fetched into `cache`, keyed by their files' names, sizes and versions. The least
    recently used are removed beyond `max_bytes`. Without `cache`, a temporary directory is used,
    which is removed when the root is closed.

    Raises:
        UsageError: fsspec or a package for the URL is not installed, or the URL cannot be used.
    """

    def __init__(self, url: str, *, cache: Path | None, max_bytes: int) -> None:
        self.url = without_user(url)
        self._store, self._path = _opened(url)
        self._max_bytes = max_bytes
        self._temporary = None
        if cache is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="loradeploy-adapters-")
            cache = Path(self._temporary.name)
        else:
            cache.mkdir(parents=True, exist_ok=True)
        self._fetched = FetchedAdapters(cache, max_bytes)
        self._lock = threading.Lock()
        # By entry: the time of the last request to the store, and its result.
        self._known: OrderedDict[str, tuple[float, Found | None]] = OrderedDict()

    def find(self, entry: str, *, fresh: bool = False) -> Found | None:
        """See `AdapterRoot`; states are cached for some seconds, unless `fresh`.

        If the store then cannot be read, the last known state is returned, unless `fresh`.
        """
        now = time.monotonic()
        with self._lock:
            known = self._known.get(entry)
        if known is not None and not fresh and now - known[0] < _REFRESH:
            return known[1]
        try:
            found = self._asked(entry)
        except Exception as problem:
            if fresh or known is None or known[1] is None:
                raise self._failed(f"the entry {entry}", problem) from None
            logger.warning("%s", self._failed(f"the entry {entry}", problem))
            found = known[1]  # the last state, because the adapter may be loaded
        with self._lock:
            self._known[entry] = now, found
            self._known.move_to_end(entry)
            while len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
        return found

    def _asked(self, entry: str) -> Found | None:
        _, files = self._listing(entry)
        return self._found(entry, files) if files else None

    def _found(self, entry: str, files: Mapping[str, Mapping[str, Any]]) -> Found:
        known = tuple(
            (inner, int(info["size"] or 0), _version(info)) for inner, info in files.items()
        )
        state = hashlib.sha256(repr((self.url, entry, known)).encode()).hexdigest()
        return Found(entry, state, sum(size for _, size, _ in known), len(known))

    def _listing(self, entry: str) -> tuple[str, dict[str, Mapping[str, Any]]]:
        """The name of the entry's folder or file, and its current files."""
        self._store.invalidate_cache()
        for name in (entry, f"{entry}{NATIVE_SUFFIX}"):
            files = self._files(name)
            if files:
                break
        return name, files

    def _files(self, name: str) -> dict[str, Mapping[str, Any]]:
        """The files of an entry by relative path; a native adapter has its own name."""
        place = f"{self._path}/{name}"
        try:
            found = self._store.find(place, detail=True)
        except FileNotFoundError:
            return {}
        files = {}
        for path, info in sorted(found.items()):
            whole = str(path).rstrip("/")
            if whole != place and not whole.startswith(f"{place}/"):
                continue  # another entry whose name begins with this one's
            inner = whole[len(place) :].lstrip("/")
            if not inner and not name.endswith(NATIVE_SUFFIX):
                return {}  # a file where a folder is expected
            if info.get("type") == "file":
                files[inner or name] = info
        return files

    @contextmanager
    def local(self, found: Found) -> Iterator[Path]:
        """See `AdapterRoot`; fetched unless it is in the cache."""
        if found.size > self._max_bytes:
            raise AdapterError(
                f"{found.entry} has {found.size:,} bytes, the cache of adapters takes"
                f" {self._max_bytes:,} (`max_cache_bytes`)"
            )
        fetch = partial(self._fetch, found)
        with self._fetched.reading(str(found.state), found.size, fetch) as place:
            native = place / f"{found.entry}{NATIVE_SUFFIX}"
            yield native if native.is_file() else place

    def _fetch(self, found: Found, directory: Path) -> None:
        """Write exactly the files that were found to `directory`."""
        changed = AdapterStoreError(f"{found.entry} has changed while it was fetched: try again")
        try:
            name, files = self._listing(found.entry)
            if self._found(found.entry, files) != found:
                raise changed
            for inner, info in files.items():
                parts = inner.split("/")
                if len(parts) > _MOST_DEPTH or not all(map(ENTRY_NAME.fullmatch, parts)):
                    raise AdapterError(f"{found.entry}: the file name {inner!a} is not allowed")
                source = f"{self._path}/{name}"
                source = source if inner == name else f"{source}/{inner}"
                target = directory.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not self._copy(source, target, int(info["size"] or 0)):
                    raise changed
            if self._asked(found.entry) != found:
                raise changed
        except LoraDeployError:
            raise
        except Exception as problem:
            raise self._failed(f"the entry {found.entry}", problem) from problem

    def _copy(self, source: str, target: Path, size: int) -> bool:
        """Copy a file; return whether it has exactly `size` bytes, of which no more are written."""
        count = 0
        with self._store.open(source, "rb") as given, target.open("wb") as taken:
            while part := given.read(_CHUNK):
                count += len(part)
                if count > size:
                    break
                taken.write(part)
        return count == size

    def has(self, found: Found) -> bool:
        """See `AdapterRoot`."""
        return self._fetched.has(str(found.state))

    def listed(self) -> list[str]:
        """See `AdapterRoot`."""
        try:
            self._store.invalidate_cache()
            found = self._store.ls(self._path, detail=True)
        except FileNotFoundError:
            return []
        except Exception as problem:
            raise self._failed("it", problem) from None
        names = set()
        for info in found:
            name = str(info["name"]).rstrip("/").rpartition("/")[2]
            if info.get("type") != "directory":
                if not name.endswith(NATIVE_SUFFIX):
                    continue
                name = name.removesuffix(NATIVE_SUFFIX)
            if ENTRY_NAME.fullmatch(name):
                names.add(name)
        return sorted(names)

    def without_paths(self, message: str) -> str:
        """See `AdapterRoot`."""
        return message.replace(f"{self._fetched.directory}/", "").replace(f"{self.url}: ", "")

    def close(self) -> None:
        """See `AdapterRoot`."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def _failed(self, what: str, problem: Exception) -> AdapterStoreError:
        reason = without_user(first_line(problem))
        return AdapterStoreError(f"{self.url}: {what} cannot be read: {reason}")


def without_user(text: str) -> str:
    """Remove user name and password from a URL or a text that contains one."""
    return _USER.sub("", text)


def _opened(url: str) -> tuple[AbstractFileSystem, str]:
    shown = without_user(url)
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UsageError(
            f"{shown}: pip install 'loradeploy[store]' for adapters in object stores"
        ) from None
    if "::" in url:
        raise UsageError(f"{shown}: give `adapter_root` one URL, not a chain of them")
    try:
        store, path = url_to_fs(url)
    except ImportError as problem:
        raise UsageError(f"{shown}: {without_user(first_line(problem))}") from None
    except ValueError as problem:
        raise UsageError(
            f"{shown} is not a URL that fsspec opens: {without_user(first_line(problem))}"
        ) from None
    return store, str(path).rstrip("/")


def _version(info: Mapping[str, Any]) -> str:
    """The metadata that identifies the version of an object."""
    return repr(sorted((key, str(value)) for key, value in info.items() if key != "name"))
