"""How much memory a batch takes, and how much there is: refused before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.names import PAST
from loradeploy.errors import BudgetError

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest

_MIB: Final = 1 << 20
_MEMINFO: Final = Path("/proc/meminfo")
_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")  # of a container
_CURRENT: Final = Path("/sys/fs/cgroup/memory.current")


def check_memory(
    manifest: Manifest,
    vocabulary: int | None,
    prompts: Sequence[int],
    sequences: Sequence[int],
    new: Sequence[int],
    limit: int | None,
) -> None:
    """Raise BudgetError where a batch takes more than `limit` bytes.

    By default what the machine has available, where it says so (Linux, on the CPU).
    `prompts`, `sequences`, `new`: of each prompt, its tokens, its texts or beams, and the most
    tokens that each of these gets.
    """
    available = limit if limit is not None else available_memory()
    if available is None:
        return
    longest = max(prompt + more for prompt, more in zip(prompts, new, strict=True))
    rows = sum(sequences)
    cache = rows * longest * position_bytes(manifest)
    # The graph makes a cache that grows anew while the last one is read.
    cache *= 1 if manifest.cache_in_place else 2
    logits = len(prompts) * max(prompts) * (vocabulary or 0) * 4
    if cache + logits > available:
        whose = "`cache_budget` is" if limit is not None else "the machine has"
        raise BudgetError(
            f"{rows} rows of {longest} tokens take {cache / _MIB:.0f} MiB of cache and their"
            f" prompts {logits / _MIB:.0f} MiB of logits, {whose} {available / _MIB:.0f} MiB: give"
            " a smaller batch_size, num_beams, n or max_new_tokens, or shorter prompts"
        )


def position_bytes(manifest: Manifest) -> int:
    """The bytes of the cache for one token of one row."""
    return sum(
        int(spec.shape[1]) * int(spec.shape[3]) * np.dtype(spec.dtype).itemsize
        for spec in manifest.inputs
        if spec.name.startswith(PAST) and len(spec.shape) == 4
    )


def available_memory() -> int | None:
    """The bytes that this process may still take, by the system and its container."""
    found = [_of_system(), _of_container()]
    return min((size for size in found if size is not None), default=None)


def _of_system() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable" and value.split():
            return int(value.split()[0]) << 10
    return None


def _of_container() -> int | None:
    try:
        limit, current = _LIMIT.read_text(), _CURRENT.read_text()
        return max(0, int(limit) - int(current))
    except (OSError, ValueError):  # "max", or no such files
        return None
