"""Adapters in a stack of a graph with `adapter_ids`: their slots are their only copy in memory."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.export.api import export
from loradeploy.runtime.adapters.filling import Filler
from loradeploy.runtime.adapters.resident import Resident
from loradeploy.runtime.adapters.stacks import Stack, Stacks
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter, once
from tests.runtime.feeds import feeds, logits, random_ids
from tests.tolerances import tolerance

IDS = random_ids(4, 5)
NAMES = tuple(f"a{seed}" for seed in range(8))
PATIENCE = 60.0  # seconds; longer means a deadlock


@pytest.fixture(scope="session")
def slots(tiny_llama: Path, shared: Path) -> Path:
    return once(shared / "stacks-slots", lambda out: export(tiny_llama, out, layout="slots"))


@pytest.fixture(scope="session")
def equal_ranks(tiny_llama: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    return {
        name: make_adapter(tiny_llama, seed=seed, r=4, alpha=8) for seed, name in enumerate(NAMES)
    }


@pytest.fixture
def opened(slots: Path, equal_ranks: dict[str, Path]) -> Iterator[Callable[..., AdapterSession]]:
    """A function: sessions with the adapters loaded."""
    sessions = []

    def make(names: tuple[str, ...] = NAMES, **options: Any) -> AdapterSession:
        session = AdapterSession(slots, **options)
        sessions.append(session)
        for name in names:
            session.load(name, equal_ranks[name])
        return session

    yield make
    for session in sessions:
        session.close()


@pytest.fixture(scope="module")
def alone(slots: Path, equal_ranks: dict[str, Path]) -> dict[str | None, Any]:
    """The logits of each adapter, from a session that never made a stack."""
    with AdapterSession(slots) as session:
        for name, path in equal_ranks.items():
            session.load(name, path)
        found: dict[str | None, Any] = {name: logits(session, IDS, name) for name in NAMES}
        found[None] = logits(session, IDS)
    return found


def stack_of(session: AdapterSession) -> Stack:
    stack = session._bank._leases._stacks._stack
    assert stack is not None
    return stack


def resident(session: AdapterSession, name: str) -> Resident:
    digest = session.adapters[name]
    assert digest is not None
    return session._bank._memory[digest]


def in_stack(session: AdapterSession, name: str) -> bool:
    """Whether all arrays of an adapter are views of the stack."""
    arrays = stack_of(session).arrays
    shared = [np.shares_memory(v, arrays[n]) for n, v in resident(session, name).host.items()]
    assert shared and len(set(shared)) == 1
    return shared[0]


def two_slots(opened: Callable[..., AdapterSession]) -> int:
    """The bytes of a stack of two slots."""
    session = opened(("a0",))
    with session.hold(["a0", None]):
        return session.statistics.device_bytes


def worst(found: Any, rows: list[str | None], alone: dict[str | None, Any]) -> float:
    return max(float(np.abs(found[i] - alone[name][i]).max()) for i, name in enumerate(rows))


def test_adapters_of_a_mixed_batch_are_in_memory_once(
    opened: Callable[..., AdapterSession], alone: dict[str | None, Any]
) -> None:
    session = opened()
    rows: list[str | None] = ["a0", "a1", "a2", "a0"]
    mixed = logits(session, IDS, rows)
    assert worst(mixed, rows, alone) <= tolerance("rows")
    assert [in_stack(session, name) for name in NAMES[:4]] == [True, True, True, False]
    assert stack_of(session).capacity == 3  # none for the base
    with session.hold("a1") as held:  # what a run of one adapter reads
        bound = held.lease.device.values
    arrays = stack_of(session).arrays
    for name in resident(session, "a1").host:
        first = arrays[name].ctypes.data
        assert first <= bound[name].data_ptr() < first + arrays[name].nbytes, name


def test_an_adapter_in_a_stack_gives_the_same_numbers_as_before(
    opened: Callable[..., AdapterSession], alone: dict[str | None, Any]
) -> None:
    session = opened()
    before = logits(session, IDS, ["a3", "a1", None, "a1"])
    for name in (*NAMES, None):
        np.testing.assert_array_equal(logits(session, IDS, name), alone[name])
    logits(session, IDS, ["a4", "a5", "a6", "a7"])  # a larger stack
    assert all(in_stack(session, name) for name in NAMES if name not in ("a0", "a2"))
    for name in (*NAMES, None):
        np.testing.assert_array_equal(logits(session, IDS, name), alone[name])
    np.testing.assert_array_equal(logits(session, IDS, ["a3", "a1", None, "a1"]), before)
    blended = logits(session, IDS, {"a3": 0.5, "a0": 0.5})
    np.testing.assert_array_equal(blended, logits(opened(), IDS, {"a3": 0.5, "a0": 0.5}))
    assert np.abs(blended - alone["a3"]).max() > 0.05


def test_the_base_gets_a_slot_when_a_batch_first_needs_it(
    opened: Callable[..., AdapterSession], alone: dict[str | None, Any]
) -> None:
    session = opened()
    logits(session, IDS, ["a0", "a1", "a2", "a3"])
    size = session.statistics.device_bytes
    rows: list[str | None] = [None, "a1", None, "a3"]
    assert worst(logits(session, IDS, rows), rows, alone) <= tolerance("rows")
    assert session.statistics.device_bytes == size * 5 // 4
    assert all(in_stack(session, name) for name in NAMES[:4])


def test_an_overwritten_slot_is_not_read_as_its_previous_adapter(
    opened: Callable[..., AdapterSession], alone: dict[str | None, Any]
) -> None:
    session = opened(device_budget=two_slots(opened))
    logits(session, IDS, ["a0", None, "a0", None])
    assert in_stack(session, "a0")
    np.testing.assert_array_equal(logits(session, IDS, "a0"), alone["a0"])  # binds the slot
    mixed = logits(session, IDS, ["a1", None, "a1", None])
    assert worst(mixed, ["a1", None, "a1", None], alone) <= tolerance("rows")
    assert (in_stack(session, "a0"), in_stack(session, "a1")) == (False, True)
    for name in ("a0", "a1"):
        np.testing.assert_array_equal(logits(session, IDS, name), alone[name])


def test_the_slot_of_an_adapter_in_use_is_kept(
    opened: Callable[..., AdapterSession], alone: dict[str | None, Any]
) -> None:
    session = opened(device_budget=two_slots(opened))
    logits(session, IDS, ["a0", None, "a0", None])
    with session.hold("a0") as held:
        rows: list[str | None] = ["a1", None, "a2", None]
        assert worst(logits(session, IDS, rows), rows, alone) <= tolerance("rows")
        (found,) = held.run(["logits"], feeds(session.manifest, IDS))
        np.testing.assert_array_equal(found, alone["a0"])
    np.testing.assert_array_equal(logits(session, IDS, "a0"), alone["a0"])


def test_a_slot_is_kept_if_its_adapter_comes_into_use_while_it_is_moved_out(
    opened: Callable[..., AdapterSession],
    alone: dict[str | None, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import loradeploy.runtime.adapters.stacks as module

    session = opened(device_budget=two_slots(opened))
    logits(session, IDS, ["a0", None, "a0", None])
    logits(session, IDS, "a0")  # so that its slot is bound, and a lease waits for no stack
    copied, used, done = threading.Event(), threading.Event(), threading.Event()
    found = []
    copy = module.in_one_block

    def between(arrays: Any) -> Any:
        monkeypatch.setattr(module, "in_one_block", copy)
        made = copy(arrays)
        copied.set()
        assert used.wait(PATIENCE)
        return made

    def use() -> None:
        assert copied.wait(PATIENCE)
        with session.hold("a0") as held:
            used.set()
            assert done.wait(PATIENCE)
            found.extend(held.run(["logits"], feeds(session.manifest, IDS)))

    monkeypatch.setattr(module, "in_one_block", between)
    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    try:
        mixed = logits(session, IDS, ["a1", None, "a1", None])
    finally:
        done.set()
        thread.join(PATIENCE)
    assert worst(mixed, ["a1", None, "a1", None], alone) <= tolerance("rows")
    np.testing.assert_array_equal(found[0], alone["a0"])


def test_the_slot_of_an_unloaded_adapter_is_used_first(
    opened: Callable[..., AdapterSession],
    alone: dict[str | None, Any],
    equal_ranks: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = opened(device_budget=3 * two_slots(opened) // 2)
    logits(session, IDS, ["a0", None, "a1", None])
    stack = stack_of(session)
    slot = stack.slots[resident(session, "a1").digest]
    session.unload("a1")
    written = []
    write = Filler.write
    monkeypatch.setattr(
        Filler, "write", lambda self, *given: written.append(given[1]) or write(self, *given)
    )
    rows: list[str | None] = ["a2", None, "a2", None]
    assert worst(logits(session, IDS, rows), rows, alone) <= tolerance("rows")
    assert written == [slot]
    assert stack_of(session) is stack and in_stack(session, "a0") and in_stack(session, "a2")
    session.load("a1", equal_ranks["a1"])
    np.testing.assert_array_equal(logits(session, IDS, "a1"), alone["a1"])


def test_a_replaced_adapter_is_read_by_later_runs_only(
    opened: Callable[..., AdapterSession],
    alone: dict[str | None, Any],
    equal_ranks: dict[str, Path],
) -> None:
    session = opened()
    rows = ["a0", "a1", "a0", "a1"]
    with session.hold(rows) as mixed, session.hold("a0") as single:
        session.load("a0", equal_ranks["a7"], replace=True)
        found = logits(session, IDS, ["a0", "a1", "a2", "a0"])
        assert np.abs(found[0] - alone["a7"][0]).max() <= tolerance("rows")
        batch = feeds(session.manifest, IDS)
        assert worst(mixed.run(["logits"], batch)[0], [*rows], alone) <= tolerance("rows")
        np.testing.assert_array_equal(single.run(["logits"], batch)[0], alone["a0"])
    np.testing.assert_array_equal(logits(session, IDS, "a0"), alone["a7"])


def test_an_adapter_of_a_smaller_rank_keeps_its_own_arrays(
    opened: Callable[..., AdapterSession],
    alone: dict[str | None, Any],
    tiny_llama: Path,
    make_adapter: MakeAdapter,
) -> None:
    session = opened()
    logits(session, IDS, ["a0", "a1", None, None])
    assert in_stack(session, "a0")
    session.load("large", make_adapter(tiny_llama, seed=20, r=16))
    large = logits(session, IDS, "large")
    mixed = logits(session, IDS, ["large", "a0", None, None])  # the stack is padded from now on
    assert [in_stack(session, name) for name in ("a0", "a1", "large")] == [False, False, True]
    assert np.abs(mixed[0] - large[0]).max() <= tolerance("rows")
    for name in ("a0", "a1"):
        np.testing.assert_array_equal(logits(session, IDS, name), alone[name])
    np.testing.assert_array_equal(logits(session, IDS, "large"), large)


def test_a_stack_beyond_the_budget_is_no_home(
    opened: Callable[..., AdapterSession], alone: dict[str | None, Any]
) -> None:
    session = opened(device_budget=two_slots(opened))
    with session.hold(["a0", "a1", "a2", "a3"]):
        assert not any(in_stack(session, name) for name in NAMES[:4])
    assert session.statistics.device_bytes == 0
    np.testing.assert_array_equal(logits(session, IDS, "a3"), alone["a3"])


def test_threads_that_mix_adapters_and_use_them_alone_get_no_wrong_number(
    opened: Callable[..., AdapterSession],
    alone: dict[str | None, Any],
    equal_ranks: dict[str, Path],
) -> None:
    size = two_slots(opened) // 2
    session = opened((), host_budget=6 * size, device_budget=4 * size)
    for name, path in equal_ranks.items():
        session.register(name, path)

    def run(seed: int) -> float:
        choose = random.Random(seed)
        names: list[str | None] = [*NAMES, None]
        if choose.random() < 0.5:
            name = choose.choice(names)
            return float(np.abs(logits(session, IDS, name) - alone[name]).max())
        rows = [choose.choice(names) for _ in range(len(IDS))]
        return worst(logits(session, IDS, rows), rows, alone)

    with ThreadPoolExecutor(6) as pool:
        largest = max(pool.map(run, range(300), timeout=PATIENCE))
    assert largest <= tolerance("rows")
    assert session.statistics.evictions > 0
    assert isinstance(session._bank._leases._stacks, Stacks)
