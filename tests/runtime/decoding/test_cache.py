"""The two kinds of cache of a decoder: growing, or a buffer of fixed size written in place."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest

from loradeploy.bundle.manifest import TensorSpec
from loradeploy.errors import UsageError
from loradeploy.runtime.cache import DecoderCache
from loradeploy.runtime.capture.pool import CachePool
from loradeploy.runtime.decoding.caches.memory import row_bytes
from tests.bundle.manifests import a_manifest

PAST = ("past_key_values.0.key", "past_key_values.0.value")
PRESENT = ("present.0.key", "present.0.value")


def a_cache(*, past: int | str = "past", **manifest: Any) -> DecoderCache:
    inputs = tuple(TensorSpec(name, "float32", ("batch", 2, past, 4)) for name in PAST)
    return DecoderCache(a_manifest(inputs=inputs, **manifest), ("cpu", 0), batch=3)


def shapes(cache: DecoderCache) -> set[tuple[int, ...]]:
    assert tuple(cache.inputs) == PAST
    return {tuple(value.shape()) for value in cache.inputs.values()}


def addresses(cache: DecoderCache) -> list[int]:
    return [value.data_ptr() for value in cache.inputs.values()]


@pytest.mark.parametrize(
    "cache",
    [a_cache(), a_cache(past=0, cache_in_place=True)],
    ids=["of Attention", "of a fixed shape"],
)
def test_a_growing_cache_starts_empty_and_takes_the_outputs_of_a_run(cache: DecoderCache) -> None:
    assert cache.outputs == PRESENT
    cache.make_room(100)
    assert shapes(cache) == {(3, 2, 0, 4)}
    assert not cache.buffers
    given = [
        onnxruntime.OrtValue.ortvalue_from_numpy(np.full((3, 2, 1, 4), n, np.float32))
        for n in range(2)
    ]
    cache.keep(given)
    assert [value.numpy().max() for value in cache.inputs.values()] == [0, 1]


def test_a_cache_in_place_is_read_and_written_in_one_buffer_and_keeps_its_values() -> None:
    cache = a_cache(cache_in_place=True)
    assert shapes(cache) == {(3, 2, 0, 4)}
    cache.make_room(5)
    ((*_, room, _),) = shapes(cache)
    assert room >= 5
    for _ in range(2):
        assert [cache.buffers[name].data_ptr() for name in PRESENT] == addresses(cache)
        cache.keep([cache.buffers[name] for name in PRESENT])
    before = addresses(cache)
    cache.make_room(room)
    assert addresses(cache) == before
    for value in cache.inputs.values():
        value.update_inplace(np.full(value.shape(), 7, np.float32))
    cache.make_room(room + 1)
    ((*_, larger, _),) = shapes(cache)
    assert larger >= 2 * room
    for value in cache.inputs.values():
        assert (value.numpy()[:, :, :room] == 7).all()
        assert not value.numpy()[:, :, room:].any()
    assert [cache.buffers[name].data_ptr() for name in PRESENT] == addresses(cache)


def test_a_cache_in_place_has_no_more_room_than_needed_positions() -> None:
    cache = a_cache(cache_in_place=True)
    rooms = []
    for positions in (600, *range(601, 1001)):
        cache.make_room(positions, 1000)
        ((*_, room, _),) = shapes(cache)
        rooms.append(room)
    assert sorted(set(rooms)) == [856, 1000]
    cache.make_room(1001, 1000)
    assert shapes(cache) == {(3, 2, 1001, 4)}


def test_a_buffer_of_a_cache_in_place_is_freed_once_the_new_one_exists() -> None:
    cache = a_cache(cache_in_place=True)
    cache.make_room(5)
    cache.keep([cache.buffers[name] for name in PRESENT])
    buffers = [weakref.ref(value) for value in cache.inputs.values()]
    alive = []
    make = onnxruntime.OrtValue.ortvalue_from_numpy

    def counted(*arguments: Any) -> Any:
        alive.append(sum(buffer() is not None for buffer in buffers))
        return make(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", counted)
        cache.make_room(1000)
        cache.take_rows([0, 0])
    assert alive == [2, 1, 0, 0]


@pytest.mark.parametrize("kind", ["grows", "in place", "pooled"])
@pytest.mark.parametrize("change", ["join", "take_rows", "make_room", "fill"])
def test_a_change_that_fails_midway_leaves_no_mixed_cache(
    kind: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def filled(batch: int, value: float) -> DecoderCache:
        inputs = tuple(TensorSpec(name, "float32", ("batch", 2, "past", 4)) for name in PAST)
        manifest = a_manifest(inputs=inputs, cache_in_place=kind != "grows")
        cache = DecoderCache(manifest, ("cpu", 0), batch=batch, pool=pool)
        cache.fill([np.full((batch, 2, 6, 4), value, np.float32)] * 2)
        return cache

    pool = CachePool(None, None) if kind == "pooled" else None
    cache, other = filled(3, 1), filled(1, 2)
    changes: dict[str, Callable[[], None]] = {
        "join": lambda: cache.join([0, 2], 6, other, [(0, np.arange(6))], kind == "grows"),
        "take_rows": lambda: cache.take_rows([2, 0]),
        "make_room": lambda: cache.make_room(1000),
        "fill": lambda: cache.fill([np.full((2, 2, 5, 4), 3, np.float32)] * 2),
    }
    before, held, buffers = addresses(cache), dict(cache.inputs), dict(cache.buffers)
    make = onnxruntime.OrtValue.ortvalue_from_numpy
    calls: list[Any] = []

    def out_of_memory(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return make(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", out_of_memory)
        if kind == "grows" and change == "make_room":
            cache.make_room(1000)  # allocates nothing
        else:
            with pytest.raises(MemoryError):
                changes[change]()
    if kind == "in place" and change in ("take_rows", "make_room"):
        assert tuple(cache.inputs) == PAST[1:]  # incomplete: no run accepts it
        return
    assert addresses(cache) == before and cache.inputs == held and cache.buffers == buffers
    assert all((value.numpy()[:, :, :6] == 1).all() for value in cache.inputs.values())
    cache.join([0, 2], 6, other, [(0, np.arange(6))], kind == "grows")
    for value in cache.inputs.values():
        assert [set(row[:, :6].ravel()) for row in value.numpy()] == [{1}, {1}, {2}]


@pytest.mark.parametrize(
    ("dtype", "shape", "reason"),
    [
        ("float32", ("batch", "heads", "past", 4), "with numbers for heads and size"),
        ("float32", ("batch", 2, "past"), "with numbers for heads and size"),
        ("bfloat16", ("batch", 2, "past", 4), "of which numpy makes no cache"),
    ],
)
@pytest.mark.parametrize("reader", [row_bytes, lambda m: DecoderCache(m, ("cpu", 0), batch=1)])
def test_a_cache_that_cannot_be_allocated_is_refused_by_every_reader_of_its_shape(
    reader: Any, dtype: str, shape: tuple[int | str, ...], reason: str
) -> None:
    manifest = a_manifest(inputs=(TensorSpec(PAST[0], dtype, shape),))
    with pytest.raises(UsageError, match=reason):
        reader(manifest)


FORKED = """
import os
import numpy as np
from loradeploy.runtime.decoding.caches.sparse import zeros_by_page

zeros = zeros_by_page((4, 1 << 20), np.dtype("float32"))
zeros[1] = 1
child = os.fork()
if child == 0:
    zeros[2] = 7
    os._exit(0 if zeros[1].all() and zeros[2].all() else 3)
assert os.waitpid(child, 0)[1] == 0
print(zeros.sum(axis=1).tolist())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_child_does_not_write_into_the_cache_of_its_parent() -> None:
    run = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == f"[0.0, {float(1 << 20)}, 0.0, 0.0]", run.stderr
