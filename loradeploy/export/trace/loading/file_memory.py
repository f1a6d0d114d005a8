"""Keep the fp32 weights of a large checkpoint in a temporary file instead of memory.

Most large checkpoints store 16 bits. Their weights in fp32 are twice as large, 27 GB for 7 billion
parameters, and are read once. Mapped from a file, they take no memory that the operating system
cannot reuse: it reads them again when they are needed.
"""

from __future__ import annotations

import contextlib
import mmap
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.files.base_files import base_tensors
from loradeploy.bundle.graph_form import DEFAULT_PRECISION
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import torch

logger = logger_of(__name__)

_WIDENED: Final = ("BF16", "F16")
_LARGE_MODEL: Final = 4 << 30  # bytes in fp32
_LARGE_TENSOR: Final = 1 << 20
_FLOAT32_BYTES: Final = 4
_GB: Final = 10**9


@dataclass(frozen=True)
class Scratch:
    """The directory for a temporary file, and the precision of the output written there."""

    directory: Path
    precision: str


def takes_file(directory: Path, scratch: Scratch) -> bool:
    """Whether the fp32 weights of the checkpoint in `directory` belong into a file in `scratch`.

    That is so if 16-bit weights would take 4 GiB in fp32, and the disk has room for the file and
    the output: in fp32 it is of the same size, in other precisions of at most half the size.
    """
    tensors = base_tensors(directory).values()
    numbers = sum(tensor.raw.nbytes // 2 for tensor in tensors if tensor.dtype in _WIDENED)
    size = numbers * _FLOAT32_BYTES
    if size < _LARGE_MODEL:
        return False
    needed = size + (size if scratch.precision == DEFAULT_PRECISION else size // 2)
    fits = shutil.disk_usage(scratch.directory).free >= needed
    if not fits:
        logger.warning(
            "loading %d GB of weights into memory, because %s has less than %d GB free for a"
            " temporary file and the output",
            size // _GB,
            scratch.directory,
            needed // _GB,
        )
    return fits


@contextlib.contextmanager
def weights_in_file(directory: Path) -> Iterator[None]:
    """Inside the context, transformers loads large fp32 weights into a file in `directory`.

    The file has no name, and its space is freed with the last weight, also in a killed process. On
    a full disk, further weights are loaded into memory, with a warning.
    """
    from transformers import core_model_loading as loading

    load = getattr(loading, "_materialize_copy", None)
    if load is None:  # another version of transformers
        logger.info("this version of transformers loads all weights into memory")
        yield
        return
    with tempfile.TemporaryFile(buffering=0, dir=directory) as file:
        stored = _Stored(file)

        def load_into_file(*arguments: Any, **options: Any) -> torch.Tensor:
            return stored.moved(load(*arguments, **options))

        loading._materialize_copy = load_into_file
        try:
            yield
        finally:
            loading._materialize_copy = load


class _Stored:
    """Tensors in `file`, each mapped copy-on-write. Safe from several threads."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._full = False

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in the file, if it is large and in fp32; else `tensor` itself."""
        import torch

        large = tensor.dtype is torch.float32 and tensor.nbytes >= _LARGE_TENSOR
        if not large or tensor.device.type != "cpu":
            return tensor
        with self._lock:
            if self._full:
                return tensor
            begin = self._file.seek(_aligned(self._file.seek(0, 2)))
            try:
                content = tensor.reshape(-1).view(torch.uint8).numpy().data
                while content:
                    content = content[self._file.write(content) :]
                mapped = mmap.mmap(
                    self._file.fileno(), tensor.nbytes, offset=begin, access=mmap.ACCESS_COPY
                )
            except OSError as problem:
                self._full = True
                logger.warning(
                    "loading weights into memory, because a temporary file beside the output cannot"
                    " be written or mapped: %s",
                    problem.strerror or problem,
                )
                return tensor
        return torch.frombuffer(mapped, dtype=torch.float32).reshape(tensor.shape)


def _aligned(size: int) -> int:
    """`size`, rounded up to where a mapping may begin."""
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
