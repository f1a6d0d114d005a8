"""Read a bundle's graph and weights so that later writes to the files cannot affect a session.

By default onnxruntime maps a graph's data file. If the file is then written in place (cp, rsync
--inplace), the session's results change; if it is shortened, the process ends with SIGBUS.
Therefore the files are read into memory, checked, and passed to onnxruntime, which copies what it
needs, unless no kernel packs weights. This takes the size of the file in additional memory while
the bundle is opened, and processes do not share its pages. A mapped file avoids both costs; its
session refuses to run once it is written to (mapped.py).

Options of the user are not modified: with them, onnxruntime maps a private copy of the files in the
system's directory for temporary files. The same is done before onnxruntime 1.24, which cannot read
weights from memory. The copy is unlinked once the session is open.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import onnxruntime

from loradeploy.adapter.files.digest import bytes_digest
from loradeploy.bundle.fingerprint import file_fingerprint, fingerprint
from loradeploy.bundle.names import GRAPH_DATA_NAME, GRAPH_NAME, MANIFEST_NAME
from loradeploy.bundle.proof.provider import WEIGHTS_AT
from loradeploy.disk import scratch_directory
from loradeploy.errors import BundleError
from loradeploy.files import MAX_GRAPH_BYTES, copy_file, open_file, read_bytes
from loradeploy.runtime.reading.mapped import MappedFile, mapped_file
from loradeploy.runtime.reading.wire import without_defaults

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest

# Session option: "1" lets onnxruntime map the data file in the bundle, also without a lease.
MAPPED: Final = "loradeploy.map_weights"
_FROM_MEMORY: Final = "add_external_initializers_from_files_in_memory"
# Session option: weights in memory are used where they are, and not copied. They must stay there.
_IN_PLACE: Final = "session.use_external_initializer_file_buffers_directly"
_HAS_IN_PLACE: Final = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 31)
_BLOCK: Final = 1 << 26
# Content if there is no data file: an empty file cannot be passed.
_NOTHING: Final = b"\0"


@dataclass(frozen=True)
class Source:
    """What onnxruntime opens, a path or a graph in memory, and the options.

    `mapped`: the data file, if onnxruntime maps it, and not a private copy. `content`: memory in
    which it uses the weights, if it does not copy them.
    """

    graph: str | bytes
    options: onnxruntime.SessionOptions
    mapped: MappedFile | None = None
    content: mmap.mmap | bytes | None = None


class SessionInPlace(onnxruntime.InferenceSession):  # type: ignore[misc]
    """A session that uses its weights where they are in `content`, and keeps that memory."""

    def __init__(self, content: mmap.mmap | bytes, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._content = content


@contextmanager
def graph_source(
    bundle: Path,
    options: onnxruntime.SessionOptions | None,
    manifest: Manifest | None,
    without: Collection[str],
    name: str,
    map_weights: bool,
    unpacked: bool,
) -> Iterator[Source]:
    """Yield the graph of `bundle` and its weights, to be opened within the context.

    `manifest`: what the files are checked against. `without`: inputs whose defaults are removed.
    `name`: the graph's file. `map_weights`: map the data file if the system grants a lease on it.
    `unpacked`: whether the kernels use the weights as they are in the file. Others pack them, and
    would not need those in memory afterwards.

    Raises:
        BundleError: they cannot be read, or do not match the manifest.
        OutputError: there is no space for a private copy.
    """
    given = options
    if options is None:
        options = onnxruntime.SessionOptions()
    elsewhere = entry(options, WEIGHTS_AT)  # the weights are in another directory
    always = bool(elsewhere) or entry(options, MAPPED) == "1"
    data = Path(elsewhere or bundle) / GRAPH_DATA_NAME
    mapped = None
    if (always or map_weights) and (elsewhere or not without) and data.is_file():
        mapped = mapped_file(data, unleased=always)
    if elsewhere:
        yield Source(_graph(bundle, manifest, without, name), options, mapped)
    elif mapped is not None:
        _check_file(bundle, manifest, name)
        yield Source(os.fspath(bundle / name), options, mapped)
    elif given is None and hasattr(options, _FROM_MEMORY):
        in_place = unpacked and _HAS_IN_PLACE
        with _in_memory(bundle / GRAPH_DATA_NAME, keep=in_place) as content:
            with memoryview(content) as view:
                # A small graph may have an empty data file.
                found = fingerprint(view) if content is not _NOTHING else _of_empty_file(bundle)
            _check(bundle, manifest, found)
            getattr(options, _FROM_MEMORY)([GRAPH_DATA_NAME], [content], [len(content)])
            if in_place:
                options.add_session_config_entry(_IN_PLACE, "1")
            graph = _graph(bundle, manifest, without, name)
            yield Source(graph, options, content=content if in_place else None)
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


def entry(options: onnxruntime.SessionOptions, name: str) -> str:
    """The entry `name` of a session's options; "" if there is none."""
    try:
        return str(options.get_session_config_entry(name))
    except RuntimeError:  # raised if there is no such entry
        return ""


def _graph(
    bundle: Path,
    manifest: Manifest | None,
    without: Collection[str] = (),
    name: str = GRAPH_NAME,
) -> bytes:
    """The bytes of the graph, checked by the manifest, without the defaults of `without`."""
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
def _in_memory(file: Path, *, keep: bool) -> Iterator[mmap.mmap | bytes]:
    """Yield the bytes of `file`, in memory that is returned to the system afterwards.

    `keep`: only when nothing refers to it any more.
    """
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
        if not keep:
            with contextlib.suppress(BufferError):  # the traceback of an error still refers to it
                content.close()


def _of_empty_file(bundle: Path) -> str | None:
    """The fingerprint of an empty data file; None if there is no file."""
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
    """Like `_check`, for files that onnxruntime opens itself."""
    file = directory / GRAPH_DATA_NAME
    found = file_fingerprint(file) if manifest is not None and file.is_file() else None
    _check(named or directory, manifest, found)
    _graph(directory, manifest, name=name)


def _check(bundle: Path, manifest: Manifest | None, found: str | None) -> None:
    """Raise BundleError unless the data file's fingerprint matches the manifest."""
    if manifest is None or manifest.data_fingerprint in (None, found):
        return
    if found is None:
        raise BundleError(f"{bundle} has no {GRAPH_DATA_NAME}: copy it whole, or export again")
    raise BundleError(
        f"{bundle / GRAPH_DATA_NAME} is not the one that {MANIFEST_NAME} declares (its fingerprint"
        " has changed): copy the bundle whole, or export again"
    )
