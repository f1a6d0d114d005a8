"""Stacks of the factors of a batch, for graphs that take one slot per row."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.runtime.adapters.filling import Filler
from loradeploy.runtime.adapters.resident import Bindable
from loradeploy.runtime.adapters.row_stacks import RowStack, RowStacks
from loradeploy.runtime.session import AdapterSession
from tests.runtime.feeds import feeds, logits, random_ids
from tests.tolerances import tolerance

NAMES = ("small", "large", "partial")
IDS = random_ids(4, 6)


@pytest.fixture(scope="module")
def session(in_place: Path, llama_adapters: dict[str, Path]) -> Iterator[AdapterSession]:
    with AdapterSession(in_place) as session:
        for name in NAMES:
            session.load(name, llama_adapters[name])
        yield session


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which every slot that is written is appended."""
    slots: list[int] = []
    write = Filler.write

    def noted(self: Filler, arrays: Any, slot: int, resident: Any) -> None:
        slots.append(slot)
        write(self, arrays, slot, resident)

    monkeypatch.setattr(Filler, "write", noted)
    return slots


def alone(session: AdapterSession, rows: list[str | None]) -> list[Any]:
    return [logits(session, IDS[row : row + 1], name)[0] for row, name in enumerate(rows)]


def worst(found: Any, expected: list[Any]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


def test_only_the_changed_row_of_a_batch_is_written(
    session: AdapterSession, written: list[int]
) -> None:
    rows: list[str | None] = ["large", "small", None]
    logits(session, IDS[:3], rows)
    for change, slots in (
        (["large", "partial", None], [1]),
        (["large", "partial", None, "small"], None),  # one larger stack
        (["large", "partial", "large", "small"], [2]),
        (["large", "partial"], []),
        ([None, "partial", "large", "small"], [0]),
        ([None, "partial", "large", "small"], []),
    ):
        written.clear()
        found = logits(session, IDS[: len(change)], change)
        assert worst(found, alone(session, change)) <= tolerance("rows"), change
        assert slots is None or written == slots, change


def test_rows_that_are_side_by_side_in_a_stack_are_not_written_again(
    session: AdapterSession, written: list[int]
) -> None:
    rows: list[str | None] = ["large", "small", None, "partial"]
    expected = alone(session, rows)
    with session.hold(rows) as held:
        held.run(["logits"], feeds(session.manifest, IDS))
        written.clear()
        for kept in ([1, 2, 3], [0, 1, 2], [2, 3], [1, 2], [0, 1], [1, 2, 3]):
            held.take_rows(kept)
            found = held.run(["logits"], feeds(session.manifest, IDS[kept]))[0]
            assert worst(found, [expected[row] for row in kept]) <= tolerance("rows"), kept
            wrong = worst(found, [expected[row - 1] for row in kept])
            assert wrong > 0.05, "other rows of the stack would show"
        assert not written
        held.take_rows([0, 2])
        assert written == [0, 1], "of another stack, because these are not side by side"


def test_views_of_a_stack_are_limited(session: AdapterSession) -> None:
    rows: list[str | None] = ["large", "small", None, "partial"] * 3
    with session.hold(rows) as held:
        for first in range(10):
            for last in range(first + 1, 12):
                held.take_rows(range(first, last + 1))
        stacks = session._bank._leases._rows._stacks
        assert 0 < max(len(stack.views) for stack in stacks) <= 16


def test_rows_in_use_are_not_changed_while_others_run(session: AdapterSession) -> None:
    rows: list[str | None] = ["large", "small", None, "partial"]
    other: list[str | None] = ["small", "large", "large", None]
    batch = feeds(session.manifest, IDS)
    assert worst(alone(session, other), alone(session, rows)) > 0.05
    with session.hold(rows) as held:
        before = held.run(["logits"], batch)[0]
        for mix in (other, rows[::-1], other[:3], ["partial", *rows[:3]]):
            found = logits(session, IDS[: len(mix)], mix)
            assert worst(found, alone(session, mix)) <= tolerance("rows")
            np.testing.assert_array_equal(held.run(["logits"], batch)[0], before)
        held.take_rows([3, 1])
        assert worst(logits(session, IDS, other), alone(session, other)) <= tolerance("rows")
        part = held.run(["logits"], feeds(session.manifest, IDS[:2]))[0]
        assert worst(part, alone(session, ["partial", "small"])) <= tolerance("rows")
    assert all(not stack.readers for stack in session._bank._leases._rows._stacks)


def test_an_interrupted_end_of_a_lease_leaves_its_rows_to_other_leases(
    session: AdapterSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[str | None] = ["large", "small", None, "partial"]
    batch, trim = feeds(session.manifest, IDS), RowStacks._trim

    def interrupted(self: RowStacks, more: int) -> None:
        monkeypatch.setattr(RowStacks, "_trim", trim)
        raise KeyboardInterrupt

    with session.hold(rows) as held:
        before = held.run(["logits"], batch)[0]
        with pytest.raises(KeyboardInterrupt), session._bank.lease(rows):
            monkeypatch.setattr(RowStacks, "_trim", interrupted)
        logits(session, IDS, ["small", "large", "large", None])
        np.testing.assert_array_equal(held.run(["logits"], batch)[0], before)


def test_a_stack_of_large_ranks_is_released_once_they_are_unused(session: AdapterSession) -> None:
    logits(session, IDS, ["large", "small", "large", None])
    large = session.statistics.device_bytes
    for _ in range(3):
        found = logits(session, IDS, ["small", None, "small", None])
    assert worst(found, alone(session, ["small", None, "small", None])) <= tolerance("rows")
    smallest = min(stack.nbytes for stack in session._bank._leases._rows._stacks)
    assert smallest < large / 4


class Device:
    """Simulated device memory: copies that exist as long as their binding."""

    def __init__(self) -> None:
        self.copies: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.taken: list[weakref.ref[Any]] = []
        self.count = 0

    def bind(self, arrays: Mapping[str, Any]) -> Bindable:
        copies = {name: values.copy() for name, values in arrays.items()}
        self.taken += map(weakref.ref, arrays.values())
        for values in copies.values():
            self.copies[self.count] = values
            self.count += 1
        return Bindable(copies)

    @property
    def nbytes(self) -> int:
        return sum(values.nbytes for values in self.copies.values())


def test_every_copy_on_a_device_is_counted_and_none_stays_on_the_host(
    session: AdapterSession,
) -> None:
    logits(session, IDS[:3], ["small", "large", "partial"])  # loads them into memory
    residents = list(session._bank._memory)
    device, filler = Device(), Filler(session.manifest, {})
    rows = [residents[i % len(residents)] for i in range(16)]
    whole = 16 * sum(
        np.prod(shape) * filler.dtype.itemsize
        for shape in filler.shapes(1, filler.ranks(residents, 1)).values()
    )
    budget = int(1.5 * whole)
    stacks = RowStacks(filler, device.bind, on_host=False, least_rank=1, budget=budget)
    last: RowStack | None = None
    for count in range(16, 2, -1):  # the texts of a batch end one by one
        stack, bound = stacks.take(rows[:count], last)
        stack.readers.add(device)
        assert {len(values) for values in bound.values.values()} == {count}  # type: ignore[arg-type]
        if last is not None:
            stacks.leave(last, device)
        last = stack
        del stack, bound
        assert device.nbytes == stacks.nbytes <= budget, count
        assert not any(array() is not None for array in device.taken)
    assert last is not None
    again, _ = stacks.take(rows[:3])
    assert again is last, "the same rows are bound once"
    for name, values in last.views[0, 3].values.items():
        single = {
            name: np.empty_like(values[:1]) for name, values in last.views[0, 3].values.items()
        }
        filler.write(single, 0, rows[0])
        np.testing.assert_array_equal(values[:1], single[name])
