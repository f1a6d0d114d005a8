"""Weights in memory are moved into huge pages, and nothing is allocated for it."""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from loradeploy.runtime.reading import graph, huge_pages
from loradeploy.runtime.reading.huge_pages import full_blocks, use_huge_pages
from loradeploy.runtime.session import AdapterSession

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

HUGE = 1 << 21
SIZE = 16 * HUGE
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python 3.10 does not have


@pytest.fixture
def memory() -> Iterator[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    """Memory that was never written to, at the beginning of a huge page."""
    block = mmap.mmap(-1, SIZE + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(block, np.uint8)
    begin = -whole.ctypes.data % HUGE
    yield whole[begin : begin + SIZE]
    del whole
    del block


def in_blocks(address: int) -> bool:
    blocks = full_blocks(HUGE, math.inf)
    return any(begin <= address < begin + length for begin, length in blocks)


def test_written_memory_is_moved_and_keeps_its_contents_and_place(
    memory: np.ndarray[tuple[int], np.dtype[np.uint8]],
) -> None:
    memory[:] = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    before, address = memory.copy(), memory.ctypes.data
    assert in_blocks(address) and in_blocks(address + SIZE - 1)
    use_huge_pages()
    assert memory.ctypes.data == address
    np.testing.assert_array_equal(memory, before)


def test_memory_of_which_only_a_part_was_written_is_left_as_it_is(
    memory: np.ndarray[tuple[int], np.dtype[np.uint8]],
) -> None:
    assert not in_blocks(memory.ctypes.data)
    memory[:: HUGE // 2] = 1  # two pages of each huge page
    memory[:HUGE] = 1
    assert in_blocks(memory.ctypes.data)
    assert not any(in_blocks(memory.ctypes.data + at * HUGE) for at in range(1, SIZE // HUGE))


def test_nothing_is_moved_if_the_administrator_has_disabled_huge_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    (tmp_path / "hpage_pmd_size").write_text(f"{HUGE}\n")
    monkeypatch.setattr(huge_pages, "_SYSTEM", tmp_path)
    assert use_huge_pages() == 0
    monkeypatch.setattr(huge_pages, "_SYSTEM", tmp_path / "of a kernel without them")
    assert use_huge_pages() == 0


def test_nothing_is_moved_where_the_system_hides_the_memory_of_a_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hidden(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(huge_pages, "open", hidden, raising=False)
    assert use_huge_pages() == 0


def test_reserved_memory_is_looked_up_in_parts_until_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of a process that reserves terabytes of addresses and writes to few of them."""
    sizes: list[int] = []
    read = os.pread

    def recorded(file: int, count: int, begin: int) -> bytes:
        sizes.append(count)
        return read(file, count, begin)

    monkeypatch.setattr(os, "pread", recorded)
    with mmap.mmap(-1, 8 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE):
        list(full_blocks(HUGE, math.inf))
        assert max(sizes) == (1 << 30) // mmap.PAGESIZE * 8
        assert len(sizes) >= 8
        sizes.clear()
        assert list(full_blocks(HUGE, -math.inf)) == []
        assert sizes == []


def test_full_blocks_are_found_in_each_part(
    memory: np.ndarray[tuple[int], np.dtype[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "_WINDOW", 3 * HUGE)
    memory[:] = 1
    assert all(in_blocks(memory.ctypes.data + at * HUGE) for at in range(SIZE // HUGE))


@pytest.mark.parametrize(
    ("least", "map_weights", "expected"), [(0, False, 1), (0, True, 0), (None, False, 0)]
)
def test_sessions_on_large_weights_in_memory_use_huge_pages(
    least: int | None,
    map_weights: bool,
    expected: int,
    tiny_llama_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(graph, "use_huge_pages", lambda: calls.append(1))
    if least is not None:
        monkeypatch.setattr(graph, "_LARGE_WEIGHTS", least)
    with AdapterSession(tiny_llama_bundle, map_weights=map_weights) as session:
        mapped = type(session._session).__name__ == "MappedSession"
    if map_weights and not mapped:
        pytest.skip("the system grants no lease on the file")
    assert len(calls) == expected
