"""The lifetime of a session: it ends with close(), and belongs to one process."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.errors import LoraDeployError, UsageError
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.conftest import MakeAdapter
from tests.runtime.feeds import feeds, logits, random_ids

IDS = random_ids(3, 5)
PATIENCE = 60.0  # seconds; longer means a deadlock


@pytest.fixture
def adapter(tiny_llama: Path, make_adapter: MakeAdapter) -> Path:
    return make_adapter(tiny_llama)


@pytest.fixture
def session(tiny_llama_bundle: Path, adapter: Path) -> AdapterSession:
    session = AdapterSession(tiny_llama_bundle)
    session.load("one", adapter)
    return session


USES: dict[str, Callable[[AdapterSession, Path], Any]] = {
    "run": lambda session, _: logits(session, IDS),
    "run with an adapter": lambda session, _: logits(session, IDS, "one"),
    "hold": lambda session, _: session.hold(None).__enter__(),
    "load": lambda session, path: session.load("two", path),
    "register": lambda session, path: session.register("two", path),
    "pin": lambda session, _: session.pin("one"),
    "unpin": lambda session, _: session.unpin("one"),
    "unload": lambda session, _: session.unload("one"),
    "adapters": lambda session, _: session.adapters,
    "statistics": lambda session, _: session.statistics,
    "providers": lambda session, _: session.providers,
    "placement": lambda session, _: session.placement,
}


def test_every_call_after_close_is_refused(session: AdapterSession, adapter: Path) -> None:
    with session as opened:
        assert opened is session
    session.close()  # a second call has no effect
    for use in USES.values():
        with pytest.raises(UsageError, match="is closed"):
            use(session, adapter)


def test_a_closed_session_keeps_no_graph_in_memory(session: AdapterSession) -> None:
    TextGenerator(session).generate(["a", "b"], ["one", None], max_new_tokens=2)
    graph = weakref.ref(session._session)
    session.close()
    assert graph() is None


def test_what_is_left_of_runs_keeps_no_closed_graph_in_memory(
    in_place: Path, adapter: Path
) -> None:
    with AdapterSession(in_place) as session:
        session.load("one", adapter)
        cache = session.empty_cache(2)
        cache.make_room(1)
        graph, left = weakref.ref(session._session), []
        for rows in (["one", None], ["one"] * 2, [None] * 2):
            with session.hold(rows) as held:
                given = {
                    "input_ids": np.ones((2, 1), np.int64),
                    "attention_mask": np.ones((2, 1), np.int64),
                    "position_ids": np.zeros((2, 1), np.int64),
                    **cache.inputs,
                }
                names = ["logits", *cache.outputs]
                results = held.run_with_ort_values(names, given, buffers=cache.buffers)
                left.append((held, results))
    assert graph() is None
    assert all(np.isfinite(results[0].numpy()).all() for _, results in left)


def test_close_waits_for_calls_in_progress(session: AdapterSession) -> None:
    expected = logits(session, IDS, ["one", None, "one"])
    closed = threading.Event()

    def close() -> None:
        session.close()
        closed.set()

    with session.hold(["one", None, "one"]) as held:
        with pytest.raises(UsageError, match="in the middle of a run"):
            session.close()  # would wait for itself
        thread = threading.Thread(target=close, daemon=True)
        thread.start()
        assert not closed.wait(0.3), "the session was closed under a run"
        result = held.run(["logits"], feeds(session.manifest, IDS))[0]
    np.testing.assert_array_equal(result, expected)
    assert closed.wait(PATIENCE)
    thread.join(PATIENCE)


def test_runs_and_loads_concurrent_with_close_complete_or_are_refused(
    tiny_llama_bundle: Path, adapter: Path
) -> None:
    for _ in range(10):
        session = AdapterSession(tiny_llama_bundle)
        session.load("one", adapter)
        expected = logits(session, IDS, ["one", None, "one"])
        ready = threading.Barrier(7)

        def use(number: int, session: AdapterSession = session, ready: Any = ready) -> str:
            ready.wait(PATIENCE)
            try:
                while True:
                    if number == 0:
                        session.load("two", adapter)
                        session.unload("two")
                    else:
                        result = logits(session, IDS, ["one", None, "one"])
                        np.testing.assert_array_equal(result, expected)  # noqa: B023
            except LoraDeployError as problem:
                return str(problem)

        with ThreadPoolExecutor(6) as pool:
            ends = [pool.submit(use, number) for number in range(6)]
            ready.wait(PATIENCE)
            session.close()
            for end in ends:
                assert "is closed" in end.result(PATIENCE)


@pytest.mark.parametrize("send", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_session_cannot_be_pickled_or_copied(
    send: Callable[[Any], Any], session: AdapterSession
) -> None:
    with pytest.raises(UsageError, match="open the bundle there"):
        send(session)


FORK = """
import os, sys
import numpy as np
from loradeploy.errors import UsageError
from loradeploy.runtime.session import AdapterSession
from tests.runtime.test_lifetime import IDS, USES
from pathlib import Path

bundle, adapter = map(Path, sys.argv[1:])
session = AdapterSession(bundle)
session.load("one", adapter)
expected = USES["run with an adapter"](session, adapter)
session._bank._lock.acquire()  # as another thread may hold it when the process forks
child = os.fork()
if child == 0:
    for name, use in {**USES, "close": lambda session, _: session.close()}.items():
        try:
            use(session, adapter)
        except UsageError as problem:
            assert "another process" in str(problem), problem
        else:
            os._exit(3)
    own = AdapterSession(bundle)  # one that is opened after the fork is its own
    own.load("one", adapter)
    same = np.array_equal(USES["run with an adapter"](own, adapter), expected)
    os._exit(0 if same else 4)
session._bank._lock.release()
_, status = os.waitpid(child, 0)
assert np.array_equal(USES["run with an adapter"](session, adapter), expected)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_cannot_use_the_session_and_can_open_its_own(
    tiny_llama_bundle: Path, adapter: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(tiny_llama_bundle), str(adapter)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def run_in_a_process(bundle: Path, adapter: Path) -> Any:
    """Open the bundle in a spawned process and return its logits."""
    with AdapterSession(bundle) as session:
        session.load("one", adapter)
        return logits(session, IDS, "one")


def test_spawned_processes_open_the_bundle_themselves(
    session: AdapterSession, tiny_llama_bundle: Path, adapter: Path
) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        result = pool.submit(run_in_a_process, tiny_llama_bundle, adapter).result(PATIENCE)
    np.testing.assert_array_equal(result, logits(session, IDS, "one"))
