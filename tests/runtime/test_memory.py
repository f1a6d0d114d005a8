"""Freed memory is returned when that takes a small part of the time of the work before it."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from loradeploy.runtime import memory

MIB = 1 << 20


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list whose only element is the resident memory, in MiB, and memory that was returned."""
    found = [100]
    monkeypatch.setattr(memory, "resident_memory", lambda: found[0] * MIB)
    monkeypatch.setattr(memory, "_RETURNS", memory._Returns())
    monkeypatch.setattr(memory, "worked", lambda: (0.0, 0.0))
    monkeypatch.setattr(sys, "platform", "linux")
    return found


def after(seconds: float, processor: float | None = None) -> None:
    """Work of `seconds` has ended."""
    memory.return_after((-seconds, -(seconds if processor is None else processor)))


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch, resident: list[int]) -> list[int]:
    """The calls of the C library's function, which returns what is above 100 MiB."""
    calls: list[int] = []

    class Library:
        def __init__(self, name: None) -> None:
            pass

        def malloc_trim(self, pad: int) -> None:
            calls.append(pad)
            resident[0] = 100

    monkeypatch.setattr(ctypes, "CDLL", Library)
    memory.return_freed_memory()
    calls.clear()
    return calls


def test_work_returns_memory_if_it_took_a_hundred_times_as_long_as_that_takes(
    trims: list[int], resident: list[int]
) -> None:
    resident[0] = 140  # 40 MiB of 0.5 ms each
    after(1.9)
    assert not trims
    after(0.2)  # short work adds up
    assert trims == [0] and resident == [100]
    resident[0] = 140
    after(1.9)  # the time before the last return does not count
    assert trims == [0]


@pytest.mark.parametrize("work", [(100.0, 1.9), (1.9, 100.0)], ids=["shared", "threads"])
def test_neither_waiting_nor_other_threads_count_as_work(
    trims: list[int], resident: list[int], work: tuple[float, float]
) -> None:
    resident[0] = 140
    after(*work)
    assert not trims


def test_little_memory_is_not_returned(trims: list[int], resident: list[int]) -> None:
    resident[0] = 107
    after(1000)
    resident[0] = 90
    after(1000)
    assert not trims


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_nothing_is_done_on_other_systems(
    trims: list[int], resident: list[int], monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    resident[0] = 1000
    monkeypatch.setattr(sys, "platform", platform)
    after(1000)
    memory.return_freed_memory()
    assert not trims


def test_nothing_is_done_with_another_c_library(
    resident: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    resident[0] = 1000
    after(1000)
    memory.return_freed_memory()


def test_nothing_is_returned_if_the_resident_memory_is_unknown(
    trims: list[int], resident: list[int]
) -> None:
    resident[0] = 0
    after(1000)
    assert not trims


FREED = """
import numpy as np
from loradeploy.runtime import memory

memory.keep_freed_memory()
memory.return_freed_memory()
blocks = [np.ones(1 << 16, np.uint8) for _ in range(1024)]
last = np.ones(1 << 16, np.uint8)  # keeps the heap from shrinking
del blocks
before = memory.resident_memory()
began = memory.worked()
memory.return_after(began)
print(before - memory.resident_memory())
memory.return_after(tuple(seconds - 100 for seconds in began))
print(before - memory.resident_memory())
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim"),
    reason="only glibc keeps and returns memory in this way",
)
def test_the_system_gets_freed_memory_back() -> None:
    run = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    few, many = map(int, run.stdout.split())
    assert few < 8 * MIB
    assert many > 56 * MIB
