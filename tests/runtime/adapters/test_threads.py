"""Loading, unloading and running from several threads concurrently."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.errors import UnknownAdapterError, UsageError
from loradeploy.export.api import export
from loradeploy.runtime.adapters.stacks import Stacks
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter
from tests.runtime.feeds import feeds, logits, random_ids
from tests.tolerances import tolerance

IDS = random_ids(3, 5)
PATIENCE = 60.0  # seconds; longer means a deadlock


@pytest.fixture
def adapters(tiny_llama: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    return {f"a{seed}": make_adapter(tiny_llama, seed=seed, r=2 + 3 * seed) for seed in range(4)}


def test_runs_that_share_a_session_do_not_mix_their_adapters(
    tiny_llama_bundle: Path, adapters: dict[str, Path]
) -> None:
    session = AdapterSession(tiny_llama_bundle)
    for name, path in adapters.items():
        session.load(name, path)
    mixes: list[list[str | None]] = [
        [random.Random(seed).choice([None, *adapters]) for _ in range(3)] for seed in range(12)
    ]
    expected = [logits(session, IDS, rows) for rows in mixes]

    def run(number: int) -> float:
        which = number % len(mixes)
        return float(np.abs(logits(session, IDS, mixes[which]) - expected[which]).max())

    with ThreadPoolExecutor(6) as pool:
        worst = max(pool.map(run, range(180), timeout=PATIENCE))
    assert worst <= tolerance("rows"), f"rows differ by {worst}"


def test_names_are_loaded_and_unloaded_under_load_without_a_wrong_row(
    tiny_llama_bundle: Path, adapters: dict[str, Path]
) -> None:
    """Names are replaced while four threads run: a row has one complete adapter or is refused."""
    session = AdapterSession(tiny_llama_bundle)
    names, paths = ("x", "y"), list(adapters.values())
    possible = []
    for path in paths:
        session.load("probe", path, replace=True)
        possible.append(logits(session, IDS, "probe"))
    session.unload("probe")
    base = logits(session, IDS)
    stop, wrong, unknown, runs = threading.Event(), [], [], []

    def change(seed: int) -> None:
        choose = random.Random(seed)
        while not stop.is_set():
            name = choose.choice(names)
            try:
                if choose.random() < 0.5:
                    session.load(name, choose.choice(paths), replace=True)
                else:
                    session.unload(name)
            except UnknownAdapterError:
                pass  # the other thread unloaded it first

    def run(seed: int) -> None:
        choose = random.Random(seed)
        while not stop.is_set():
            rows = [choose.choice([None, *names]) for _ in range(len(IDS))]
            try:
                result = logits(session, IDS, rows)
            except UnknownAdapterError:
                unknown.append(rows)
                continue
            runs.append(rows)
            for row, name in enumerate(rows):
                candidates = [base] if name is None else possible
                error = min(np.abs(result[row] - c[row]).max() for c in candidates)
                if error > tolerance("rows"):
                    wrong.append((rows, row, error))

    def until_stopped(work: Callable[[int], None], seed: int) -> threading.Thread:
        thread = threading.Thread(target=work, args=(seed,), daemon=True)
        thread.start()
        return thread

    threads = [until_stopped(change, seed) for seed in (1, 2)]
    threads += [until_stopped(run, seed) for seed in (3, 4, 5, 6)]
    time.sleep(4)
    end = time.monotonic() + PATIENCE  # for machines on which nothing was contended by now
    while not (runs and unknown) and time.monotonic() < end:
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    assert wrong == []
    assert runs and unknown, f"{len(runs)} runs, {len(unknown)} refusals: nothing was contended"


def test_an_unload_waits_for_the_run_that_uses_the_adapter(
    tiny_llama_bundle: Path, adapters: dict[str, Path]
) -> None:
    session = AdapterSession(tiny_llama_bundle)
    for name in ("a0", "a1"):
        session.load(name, adapters[name])
    batch = feeds(session.manifest, IDS)
    unloaded = threading.Event()

    def unload() -> None:
        session.unload("a0")
        unloaded.set()

    with session.hold(["a0", None, "a1"]) as held:
        before = held.run(["logits"], batch)[0]
        thread = threading.Thread(target=unload, daemon=True)
        thread.start()
        assert not unloaded.wait(0.3), "the adapter was taken from a run"
        with pytest.raises(UnknownAdapterError):  # new runs do not find it any more
            logits(session, IDS, "a0")
        np.testing.assert_array_equal(held.run(["logits"], batch)[0], before)
        logits(session, IDS, "a1")  # others still work
    assert unloaded.wait(PATIENCE)
    thread.join(PATIENCE)


def test_an_adapter_that_is_loaded_during_an_unload_keeps_its_texts(
    tiny_llama_bundle: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = AdapterSession(tiny_llama_bundle)
    session.load("x", adapters["a0"])
    bank = session._bank
    add, remove = bank.add, bank.remove
    removed, added = threading.Event(), threading.Event()

    def add_after_the_removal(*given: Any, **options: Any) -> Any:
        unloading.start()
        assert removed.wait(PATIENCE)
        resident = add(*given, **options)
        added.set()
        return resident

    def remove_before_the_addition(name: str) -> None:
        remove(name)
        removed.set()
        assert added.wait(PATIENCE)

    unloading = threading.Thread(target=session.unload, args=("x",))
    monkeypatch.setattr(bank, "add", add_after_the_removal)
    monkeypatch.setattr(bank, "remove", remove_before_the_addition)
    session.load("x", adapters["a0"])
    unloading.join(PATIENCE)
    assert "x" in session.adapters
    assert session.texts.of("x") is session.texts.base


def test_held_adapters_are_refused_once_their_context_has_ended(
    tiny_llama_bundle: Path, adapters: dict[str, Path]
) -> None:
    session = AdapterSession(tiny_llama_bundle, device_budget=1)
    for name in ("a0", "a1"):
        session.load(name, adapters[name])
    rows = ["a0", None, "a0"]
    with session.hold(rows) as held:
        held.run(["logits"], feeds(session.manifest, IDS))
    logits(session, IDS, ["a1", None, "a1"])  # in the slots of a0
    for run in (held.run, held.run_with_ort_values):
        with pytest.raises(UsageError, match="the context that held these adapters has ended"):
            run(["logits"], feeds(session.manifest, IDS))


def test_an_idle_slot_is_not_taken_once_another_thread_uses_its_adapter(
    tiny_llama_bundle: Path,
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The adapter of an idle slot comes into use after the slot is found and before it is taken."""
    bundle = tmp_path / "slots"
    export(tiny_llama_bundle, bundle, layout="slots")
    room = AdapterSession(bundle)
    room.load("a1", adapters["a1"])
    with room.hold(["a1", None]):
        budget = room.statistics.device_bytes  # a stack of one slot
    session = AdapterSession(bundle, device_budget=budget)
    for name in ("a0", "a1"):
        session.load(name, adapters[name])
    expected = logits(session, IDS, "a1")
    # A stack of a1's rank, whose only slot then has a0 and is idle.
    for name in ("a1", "a0"):
        logits(session, IDS, name)
        logits(session, IDS, [name, None, name])
    found, used = threading.Event(), threading.Event()
    fits = Stacks._fits_into

    def between(*arguments: Any) -> bool:
        answer = fits(*arguments)
        found.set()
        assert used.wait(PATIENCE)
        return answer

    def use() -> None:
        assert found.wait(PATIENCE)
        with session.hold("a0"):
            used.set()
            done.wait(PATIENCE)

    done = threading.Event()
    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    monkeypatch.setattr(Stacks, "_fits_into", between)
    try:
        mixed = logits(session, IDS, ["a1", None, "a1"])
    finally:
        done.set()
        thread.join(PATIENCE)
    assert np.abs(mixed[0] - expected[0]).max() <= tolerance("rows")


def test_a_concurrent_first_use_loads_the_bundles_adapter_once(
    tiny_llama: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loradeploy.runtime.adapters.reading as module
    from loradeploy.export.api import export

    export(tiny_llama, tmp_path / "bundle", adapters={"own": adapters["a1"]})
    session = AdapterSession(tmp_path / "bundle")
    loads = []
    load = module.load_adapter
    monkeypatch.setattr(module, "load_adapter", lambda path: loads.append(path) or load(path))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: logits(session, IDS, "own"), range(16), timeout=PATIENCE))
    assert len(loads) == 1
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_spare_bindings_do_not_keep_a_runs_values_alive(
    tiny_llama_bundle: Path, adapters: dict[str, Path]
) -> None:
    import gc
    import weakref

    session = AdapterSession(tiny_llama_bundle)
    session.load("a0", adapters["a0"])
    batch = feeds(session.manifest, IDS.copy())
    watched = [weakref.ref(array) for array in batch.values()]
    session.run(["logits"], batch, "a0")
    del batch
    gc.collect()
    assert [ref for ref in watched if ref() is not None] == []
