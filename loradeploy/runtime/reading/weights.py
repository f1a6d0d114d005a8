"""The bytes of a bundle's graph and weights, which no writer can change under a session.

onnxruntime maps a graph's data file. A file that is written in place (cp, rsync --inplace) changes
what a mapped session computes, and one that is shortened ends the process (SIGBUS). So the files
are read into memory, checked, and given to onnxruntime from there; it copies what it needs. That
takes memory for the file once more while the bundle is opened, and no sharing of its pages between
processes. `MAPPED` is for those who have neither, and write no file in place.

Options that a user gives are not changed: with them onnxruntime maps a private copy of the files in
the system's directory for temporary files, and so it does before onnxruntime 1.24, which takes no
files from memory. The copy has no name any more once the session is open.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import onnxruntime

from loradeploy.adapter.files.digest import bytes_digest
from loradeploy.bundle.fingerprint import file_fingerprint, fingerprint
from loradeploy.bundle.names import GRAPH_DATA_NAME, GRAPH_NAME, MANIFEST_NAME
from loradeploy.disk import scratch_directory
from loradeploy.errors import BundleError
from loradeploy.files import MAX_GRAPH_BYTES, copy_file, open_file, read_bytes
from loradeploy.runtime.reading.wire import without_defaults

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest

# A session's option: "1" lets onnxruntime map the data file where it is.
MAPPED: Final = "loradeploy.map_weights"
# Where a graph's weights are, if not beside it; onnxruntime heeds it for graphs in memory alone.
WEIGHTS_AT: Final = "session.model_external_initializers_file_folder_path"
_FROM_MEMORY: Final = "add_external_initializers_from_files_in_memory"
_BLOCK: Final = 1 << 26
_LARGEST_HEAP_BLOCK: Final = (32 << 20) - (8 << 10)  # glibc's, less what it adds
# A graph may name no data file but the bundle's: where there is none, it has no bytes.
_NOTHING: Final = b"\0"


@dataclass(frozen=True)
class Source:
    """What onnxruntime is to open: a path, or a graph in memory, and with which options."""

    graph: str | bytes
    options: onnxruntime.SessionOptions


@contextmanager
def graph_source(
    bundle: Path,
    options: onnxruntime.SessionOptions | None,
    manifest: Manifest | None,
    without: Collection[str] = (),
    name: str = GRAPH_NAME,
) -> Iterator[Source]:
    """The graph of `bundle` and its weights, to be opened within the context.

    `manifest`: what the files must be of. `without`: inputs whose defaults are left out. `name`:
    the graph's file.

    Raises:
        BundleError: they cannot be read, or are not those that the manifest declares.
        OutputError: there is no room for a private copy.
    """
    given = options
    if options is None:
        options = onnxruntime.SessionOptions()
    if entry(options, WEIGHTS_AT):  # the graph is another's, in a part of its file
        yield Source(_graph(bundle, manifest, without, name), options)
    # Nobody writes to a mapped file on Windows.
    elif (entry(options, MAPPED) == "1" or sys.platform == "win32") and not without:
        _check_file(bundle, manifest, name)
        yield Source(os.fspath(bundle / name), options)
    elif given is None and hasattr(options, _FROM_MEMORY):
        with _in_memory(bundle / GRAPH_DATA_NAME) as content:
            with memoryview(content) as view:
                # The data file of a small graph is there, and empty.
                found = fingerprint(view) if content is not _NOTHING else _of_empty_file(bundle)
            _check(bundle, manifest, found)
            getattr(options, _FROM_MEMORY)([GRAPH_DATA_NAME], [content], [len(content)])
            yield Source(_graph(bundle, manifest, without, name), options)
    else:
        with scratch_directory("loradeploy-session-") as copy:
            for file in (name, GRAPH_DATA_NAME):
                if (bundle / file).is_file():
                    copy_file(bundle / file, copy / file, error=BundleError)
            _check_file(copy, manifest, name, named=bundle)
            if without:
                content = _graph(copy, manifest, without, name)
                (copy / name).unlink()
                (copy / name).write_bytes(content)
            yield Source(os.fspath(copy / name), options)


def keep_freed_memory() -> None:
    """Let the C library keep what onnxruntime frees while it opens a graph, for the next weight.

    glibc returns a freed block to the system at once, until a program has freed a larger one; then
    every weight is laid out in pages that are new, and cleared. So the largest is freed first.
    """
    if sys.platform == "linux":
        np.empty(_LARGEST_HEAP_BLOCK, np.uint8)


def return_freed_memory() -> None:
    """Return to the system what onnxruntime freed while it laid weights out for its kernels.

    glibc keeps it otherwise: a fifth of the memory of a session on SmolLM2-135M in fp32.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
        if trim is not None:
            trim(0)


def entry(options: onnxruntime.SessionOptions, name: str) -> str:
    """The entry `name` of a session's options; "" where there is none."""
    try:
        return str(options.get_session_config_entry(name))
    except RuntimeError:  # its way to say that there is no such entry
        return ""


def _graph(
    bundle: Path,
    manifest: Manifest | None,
    without: Collection[str] = (),
    name: str = GRAPH_NAME,
) -> bytes:
    """The bytes of the graph that the manifest declares, less the defaults of `without`."""
    content = read_bytes(bundle / name, error=BundleError, limit=MAX_GRAPH_BYTES)
    declares = manifest if name == GRAPH_NAME or manifest is None else manifest.encoder
    expected = None if declares is None else declares.graph_digest
    if expected not in (None, bytes_digest(content)):
        raise BundleError(
            f"{bundle / name} does not fit the bundle's manifest: its digest has changed"
            " since the export. Export again."
        )
    return without_defaults(content, without) if without else content


@contextmanager
def _in_memory(file: Path) -> Iterator[mmap.mmap | bytes]:
    """The bytes of `file`, in memory that goes back to the system with the context's end."""
    try:
        size = file.stat().st_size if file.is_file() else 0
        if not size:
            yield _NOTHING
            return
        if sys.platform == "win32":
            content = mmap.mmap(-1, size)
        else:  # Python's default is shared memory, which is slower to fill
            content = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError):
        raise BundleError(f"{file} cannot be read into memory: there is no room for it") from None
    try:
        _read(file, content, size)
        yield content
    finally:
        with contextlib.suppress(BufferError):  # an error's traceback still looks at it
            content.close()


def _of_empty_file(bundle: Path) -> str | None:
    """The fingerprint of a data file without data; None where there is none."""
    file = bundle / GRAPH_DATA_NAME
    return file_fingerprint(file) if file.is_file() else None


def _read(file: Path, content: mmap.mmap, size: int) -> None:
    try:
        with open_file(file, error=BundleError) as opened, memoryview(content) as view:
            start = 0
            while start < size:
                with view[start : start + _BLOCK] as part:
                    count = opened.readinto(part)  # type: ignore[attr-defined]
                if not count:
                    raise BundleError(f"{file} was shortened while it was read: try again")
                start += count
    except OSError as problem:
        raise BundleError(f"{file} cannot be read: {problem.strerror or problem}") from None


def _check_file(
    directory: Path, manifest: Manifest | None, name: str, named: Path | None = None
) -> None:
    """As `_check`, of files that onnxruntime opens itself."""
    file = directory / GRAPH_DATA_NAME
    found = file_fingerprint(file) if manifest is not None and file.is_file() else None
    _check(named or directory, manifest, found)
    _graph(directory, manifest, name=name)


def _check(bundle: Path, manifest: Manifest | None, found: str | None) -> None:
    """Raise BundleError unless the data file's fingerprint is the one that the manifest has."""
    if manifest is None or manifest.data_fingerprint in (None, found):
        return
    if found is None:
        raise BundleError(f"{bundle} has no {GRAPH_DATA_NAME}: copy it whole, or export again")
    raise BundleError(
        f"{bundle / GRAPH_DATA_NAME} is not the one that {MANIFEST_NAME} declares (its fingerprint"
        " has changed): copy the bundle whole, or export again"
    )
