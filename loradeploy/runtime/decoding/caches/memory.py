"""Compare the memory that a batch needs with what is available, before it is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.bundle.names import is_cross
from loradeploy.errors import BudgetError
from loradeploy.runtime.cache import cache_inputs
from loradeploy.runtime.devices.cgroups import free_memory
from loradeploy.runtime.devices.findings import machine_root

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest
    from loradeploy.runtime.session import AdapterSession

_MIB: Final = 1 << 20


def check_memory(
    session: AdapterSession,
    limit: int | None,
    prompts: Sequence[int],
    sequences: Sequence[int],
    new: Sequence[int],
) -> None:
    """Raise BudgetError if a batch needs more than `limit` bytes.

    If `limit` is None, the available memory of the machine is used, if known (Linux, on the CPU).
    `prompts`, `sequences`, `new`: for each prompt or source, its number of tokens, its number of
    texts or beams, and the maximum number of new tokens of each.
    """
    available = memory_for_rows(session, limit)
    if available is None:
        return
    manifest, vocabulary = session.manifest, session.limits.vocabulary
    longest = max(prompts) + max(new)  # shorter prompts are padded
    rows = sum(sequences)
    cache = rows * longest * row_bytes(manifest)
    # Without a cache, every step processes complete rows.
    read = len(prompts) * max(prompts) if cache else rows * longest
    if manifest.logits_to_keep and max(new):
        read = max(len(prompts), rows)  # only those of the last tokens
    logits = read * (vocabulary or 0) * 4
    cache += rows * _source_bytes(manifest, max(prompts))
    if cache + logits > available:
        whose = "`cache_budget` is" if limit is not None else "the machine has"
        raise BudgetError(
            f"{rows} rows of {longest} tokens take {cache / _MIB:.0f} MiB of cache and"
            f" {logits / _MIB:.0f} MiB of logits, {whose} {available / _MIB:.0f} MiB: give"
            " a smaller batch_size, num_beams, n or max_new_tokens, or shorter prompts"
        )


def memory_for_rows(session: AdapterSession, limit: int | None) -> int | None:
    """The bytes that rows may use: `limit`, or the available memory; None if unknown."""
    return limit if limit is not None or not on_host(session) else available_memory()


def on_host(session: AdapterSession) -> bool:
    """Whether the cache is in host memory."""
    return session.providers[:1] == ("CPUExecutionProvider",)


def position_bytes(session: AdapterSession) -> int:
    """The bytes of one position of one row: of the cache, or without one, of the logits.

    0 if the vocabulary size is unknown too.
    """
    return row_bytes(session.manifest) or (session.limits.vocabulary or 0) * 4


def row_bytes(manifest: Manifest) -> int:
    """The bytes of one position of one row during a run.

    A graph writes a growing cache again while it reads the last one. Buffers of a cache in place
    are moved one by one when they grow.
    """
    sizes = _position_bytes(manifest)
    return sum(sizes) + (max(sizes, default=0) if manifest.cache_in_place else sum(sizes))


def _position_bytes(manifest: Manifest) -> list[int]:
    """The bytes of one position of one row, for each tensor of the cache."""
    return [
        int(spec.shape[1]) * int(spec.shape[3]) * np.dtype(spec.dtype).itemsize
        for spec in cache_inputs(manifest)
    ]


def _source_bytes(manifest: Manifest, tokens: int) -> int:
    """The bytes of the cross-attention cache of one row.

    `tokens`: of the source, if the encoder takes any number of them.
    """
    found = 0
    for spec in manifest.inputs:
        if is_cross(spec.name):
            _, heads, length, size = spec.shape
            positions = length if isinstance(length, int) else tokens
            found += int(heads) * positions * int(size) * np.dtype(spec.dtype).itemsize
    return found


def available_memory(root: Path | None = None) -> int | None:
    """The bytes that this process can still allocate, by the system and its container.

    `root`: the root directory of the machine's files.
    """
    root = machine_root() if root is None else root
    found = [_of_system(root), free_memory(root)]
    return min((size for size in found if size is not None), default=None)


def _of_system(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable" and value.split():
            return int(value.split()[0]) << 10
    return None
