"""The engine: order, limits, endings, prefix cache and failures. Results: see test_load.py."""

from __future__ import annotations

import asyncio
import ctypes
import shutil
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.errors import (
    BudgetError,
    DeadlineError,
    EngineClosedError,
    EngineFullError,
    RunError,
    UsageError,
)
from loradeploy.runtime.decoding.caches.memory import position_bytes
from loradeploy.runtime.decoding.caches.slots import SlotRows
from loradeploy.runtime.decoding.caches.sparse import return_pages, zeros_by_page
from loradeploy.runtime.decoding.graph import DecoderGraph
from loradeploy.runtime.engine.engine import Engine
from loradeploy.runtime.engine.prefix import BLOCK
from loradeploy.runtime.engine.submission import GenerationEvent
from loradeploy.runtime.engine.worker import Worker
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.inputs.edits import edited_json

LONG = list(range(20, 20 + 3 * BLOCK + 2))


def test_events_are_the_text_and_the_tokens_of_the_result(session: AdapterSession) -> None:
    async def read(engine: Engine) -> list[GenerationEvent]:
        submission = engine.submit(
            "The bank", "large", max_new_tokens=8, n=2, temperature=1.0, logprobs=1
        )
        assert await submission.started() == submission.prompt_tokens
        return [event async for event in submission]

    with Engine(session) as engine:
        events = asyncio.run(read(engine))
    alone = TextGenerator(session).generate(
        ["The bank"], "large", max_new_tokens=8, n=2, temperature=1.0, logprobs=1
    )
    for choice, expected in enumerate(alone):
        own = [event for event in events if event.choice == choice]
        assert len(own) > 2
        assert "".join(event.text for event in own) == expected.text
        assert sum((event.token_ids for event in own), ()) == expected.token_ids
        logprobs = [part for event in own for part in event.logprobs or ()]
        assert [part.token_id for part in logprobs] == list(expected.token_ids)
        assert [event.generation is None for event in own] == [True] * (len(own) - 1) + [False]
        assert own[-1].generation is not None
        assert own[-1].generation.finish_reason == expected.finish_reason
    assert [event.usage is None for event in events] == [True] * (len(events) - 1) + [False]
    usage = events[-1].usage
    assert usage is not None
    assert usage.prompt_tokens == alone[0].prompt_tokens
    assert usage.completion_tokens == sum(one.completion_tokens for one in alone)


def test_a_common_prefix_is_processed_once_per_adapter_and_scope(
    session: AdapterSession,
) -> None:
    def ask(engine: Engine, adapter: Any, scope: str | None, last: int) -> tuple[int, Any]:
        done = engine.submit([*LONG, last], adapter, scope=scope, max_new_tokens=4).result(60)
        return done.usage.cached_tokens, done.generations[0].token_ids

    generator = TextGenerator(session)
    alone = {
        (adapter, last): generator.generate([[*LONG, last]], adapter, max_new_tokens=4)[0].token_ids
        for adapter in ("large", "small", None)
        for last in (7, 9)
    }
    assert len(set(alone.values())) > 3
    shared = 3 * BLOCK
    with Engine(session, prefill_chunk=16) as engine:
        for adapter, scope, last, cached in (
            ("large", "a", 7, 0),
            ("large", "a", 9, shared),  # the control: found where sharing is allowed
            ("small", "a", 9, 0),
            (None, "a", 9, 0),
            ("large", "b", 9, 0),
            ("large", None, 9, 0),
            ("large", "b", 7, shared),
            ({"large": 1.0}, "a", 7, shared),  # the same factors
            ({"large": 0.5}, "a", 7, 0),
        ):
            found, ids = ask(engine, adapter, scope, last)
            assert found == cached, (adapter, scope, last)
            if not isinstance(adapter, dict):
                assert ids == alone[adapter, last]
        assert engine.stats().cached_tokens == 3 * shared
    with Engine(session, prefix_budget=0) as engine:
        assert [ask(engine, "large", "a", 7)[0] for _ in range(2)] == [0, 0]


def test_the_prefix_cache_stays_below_its_budget(session: AdapterSession) -> None:
    with Engine(session) as engine:
        engine.submit(LONG, max_new_tokens=1).result(60)
        each = engine.stats().prefix_bytes // 3
    with Engine(session, prefix_budget=4 * each) as engine:
        for first in range(6):
            engine.submit([first + 3, *LONG], max_new_tokens=1).result(60)
            assert engine.stats().prefix_bytes <= 4 * each
        stats = engine.stats()
        assert stats.prefix_entries == 4
        assert stats.prefix_evictions == 6 * 3 - 4
        again = engine.submit([5 + 3, *LONG], max_new_tokens=1).result(60)
        assert again.usage.cached_tokens == 3 * BLOCK  # the most recent prefix is kept


def test_a_long_prompt_is_processed_between_the_steps_of_others(session: AdapterSession) -> None:
    with Engine(session, prefill_chunk=8, prefix_budget=0) as engine:
        going = engine.submit("The bank", "small", max_new_tokens=60)
        next(going)
        late = engine.submit(list(range(20, 100)), "large", max_new_tokens=1)
        seen = 0
        while not late.done:
            next(going)
            seen += 1
        assert seen > 5, "it waited for the whole prompt"
        assert len(going.result(60).generations[0].token_ids) == 60


def test_free_rows_are_used_before_a_request_ends(session: AdapterSession) -> None:
    engine = Engine(session, max_rows=24)
    all_of_them = [engine.submit([5 + number], "small", max_new_tokens=80) for number in range(24)]
    with engine:
        for one in all_of_them:
            one.result(60)
        sizes = engine.stats().batch_sizes
    assert max(sizes) == 24
    assert sizes[24] > sum(count for size, count in sizes.items() if size < 12)


def test_the_queue_is_limited_and_a_scope_with_few_requests_displaces_one_with_many(
    session: AdapterSession,
) -> None:
    engine = Engine(session, max_waiting=4)  # requests wait until it is started
    first = [engine.submit("A", scope="many", max_new_tokens=2) for _ in range(4)]
    with pytest.raises(EngineFullError, match="4 requests are waiting") as full:
        engine.submit("A", scope="many")
    assert full.value.retry_after > 0
    other = engine.submit("A", scope="few", max_new_tokens=2)
    with pytest.raises(EngineFullError):
        first[-1].result(1)
    assert engine.stats().waiting == 4
    with engine:
        other.result(60)
        assert all(one.result(60).usage.completion_tokens for one in first[:-1])
        stats = engine.stats()
    assert (stats.submitted, stats.refused, stats.failed) == (5, 2, {"EngineFullError": 1})


@pytest.mark.usefixtures("slow_steps")
def test_requests_end_at_their_deadline_and_when_they_are_cancelled(
    session: AdapterSession,
) -> None:
    whole_row: dict[str, Any] = {"max_new_tokens": 100, "logit_bias": {2: -100}}
    with Engine(session, max_rows=1) as engine:
        going = engine.submit("The bank", **whole_row)
        next(going)
        waits = engine.submit("The bank", deadline=0.001)
        with pytest.raises(DeadlineError):
            waits.result(60)
        gone = engine.submit("The bank", max_new_tokens=5)
        gone.cancel()
        nothing = gone.result(60).generations[0]
        assert (nothing.finish_reason, nothing.token_ids) == ("cancelled", ())
        going.cancel()
        whole = going.result(60).generations[0]
        assert whole.finish_reason == "cancelled"
        alone = TextGenerator(session).generate(["The bank"], **whole_row)[0].token_ids
        assert whole.token_ids == alone[: len(whole.token_ids)]
        assert 0 < len(whole.token_ids) < len(alone)
        late = engine.submit("The bank", deadline=0.05, **whole_row)
        with pytest.raises(DeadlineError):
            list(late)
        assert engine.submit("The bank", max_new_tokens=2).result(60)


@pytest.mark.usefixtures("slow_steps")
def test_leaving_the_async_with_of_a_request_cancels_it(session: AdapterSession) -> None:
    async def leave(engine: Engine) -> str:
        whole_row: dict[str, Any] = {"max_new_tokens": 100, "logit_bias": {2: -100}}
        async with engine.submit("The bank", **whole_row) as submission:
            await anext(submission)
        return (await submission.completion()).generations[0].finish_reason

    with Engine(session) as engine:
        assert asyncio.run(leave(engine)) == "cancelled"


@pytest.mark.usefixtures("slow_steps")
def test_a_drain_finishes_or_cancels_all_requests_and_refuses_new_ones(
    session: AdapterSession,
) -> None:
    with Engine(session, max_rows=2) as engine:
        all_of_them = [engine.submit("The bank", max_new_tokens=4) for _ in range(5)]
        assert engine.drain(60)
        assert all(one.done for one in all_of_them)
        with pytest.raises(EngineClosedError):
            engine.submit("A")
    with Engine(session, max_rows=1) as engine:
        whole_row: dict[str, Any] = {"max_new_tokens": 100, "logit_bias": {2: -100}}
        unfinished = [engine.submit("The bank", **whole_row) for _ in range(3)]
        next(unfinished[0])
        assert not engine.drain(0.01)
        reasons = [one.result(60).generations[0].finish_reason for one in unfinished]
        assert reasons == ["cancelled"] * 3
    with pytest.raises(EngineClosedError):
        engine.start()


@pytest.mark.parametrize(
    ("prompt", "given", "problem", "message"),
    [
        ("", {}, UsageError, "empty"),
        ([9999], {}, UsageError, "9999"),
        ("A", {"temperature": 1.0, "n": 9}, UsageError, "9 rows"),
        ("A " * 60, {"max_new_tokens": 60}, BudgetError, "MiB|room for"),
    ],
    ids=["empty", "a token out of range", "more texts than rows", "more than its memory"],
)
def test_a_request_that_cannot_be_served_is_refused_by_name(
    session: AdapterSession, prompt: Any, given: Any, problem: type[Exception], message: str
) -> None:
    with Engine(session, cache_budget=100_000) as engine:
        with pytest.raises(problem, match=message):
            engine.submit(prompt, **given).result(60)
        assert engine.submit("A", max_new_tokens=2).result(60)


def test_settings_are_checked_immediately(session: AdapterSession) -> None:
    engine = Engine(session)
    with pytest.raises(UsageError, match="temperature"):
        engine.submit("A", temperature=-1)
    with pytest.raises(UsageError, match="deadline"):
        engine.submit("A", deadline=0)
    with pytest.raises(UsageError, match="max_rows"):
        Engine(session, max_rows=0)
    with pytest.raises(UsageError, match="prefix_budget"):
        Engine(session, prefix_budget=-1)


def test_an_observer_gets_the_times_of_a_request_and_its_errors_are_ignored(
    session: AdapterSession,
) -> None:
    seen: list[tuple[str, float]] = []

    def observe(moment: str, seconds: float, submission: Any) -> None:
        seen.append((moment, seconds))
        raise ValueError("an observer's fault")

    with Engine(session, observer=observe) as engine:
        began = time.monotonic()
        done = engine.submit("The bank", max_new_tokens=5, logit_bias={2: -100}).result(60)
        took = time.monotonic() - began
    counts = [moment for moment, _ in seen]
    assert done.usage.completion_tokens == 5
    for moment, times in (("queue", 1), ("prefill", 1), ("first_token", 1), ("request", 1)):
        assert counts.count(moment) == times
    assert counts.count("step") == counts.count("inter_token") == 4
    assert all(0 <= seconds <= took for _, seconds in seen)


def test_an_engine_ended_by_a_defect_reports_it(
    session: AdapterSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect() -> None:
        raise RuntimeError("a defect")

    with Engine(session) as engine:
        assert engine.alive
        monkeypatch.setattr(engine._worker, "advance", defect)
        with pytest.raises(RuntimeError, match="a defect"):
            engine.submit("The bank").result(60)
        assert not engine.alive
        with pytest.raises(EngineClosedError, match="ended by a defect .RuntimeError"):
            engine.submit("The bank")
        with pytest.raises(EngineClosedError, match="ended by a defect"):
            engine.start()
    with Engine(session) as engine:
        pass
    assert not engine.alive


class Panic(BaseException):
    """Like pyo3's exception for a panic in a Rust library."""


@pytest.mark.parametrize("after", [0, 2], ids=["with the prompt", "in a step"])
def test_a_panic_in_a_token_mask_fails_only_its_request(
    session: AdapterSession, after: int
) -> None:
    def mask(made: Any) -> Any:
        if len(made) >= after:
            raise Panic("of a grammar")
        return None

    alone = TextGenerator(session).generate(["The bank"], "large", max_new_tokens=6)[0]
    with Engine(session) as engine:
        other = engine.submit("The bank", "large", max_new_tokens=6)
        panics = engine.submit("The bank", "small", max_new_tokens=6, allowed_tokens=mask)
        with pytest.raises(RunError, match="Panic.*of a grammar") as failed:
            panics.result(60)
        assert isinstance(failed.value.__cause__, Panic)
        assert other.result(60).generations[0].token_ids == alone.token_ids
        later = engine.submit("The bank", "large", max_new_tokens=6).result(60)
        assert later.generations[0].token_ids == alone.token_ids
        assert engine.alive
        assert engine.stats().failed == {"RunError": 1}


def test_a_panic_in_the_tokenizer_fails_only_its_request(
    session: AdapterSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(session) as engine:
        read = engine._loader._reader.read

        def panics(number: int, prompt: Any, *rest: Any) -> Any:
            if prompt == "panics":
                raise Panic("of a tokenizer")
            return read(number, prompt, *rest)

        monkeypatch.setattr(engine._loader._reader, "read", panics)
        with pytest.raises(RunError, match="of a tokenizer"):
            engine.submit("panics").result(60)
        assert engine.submit("The bank", max_new_tokens=2).result(60)


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("thread", ["loader", "engine"])
def test_a_defect_of_a_thread_fails_every_request(
    session: AdapterSession, monkeypatch: pytest.MonkeyPatch, thread: str
) -> None:
    """One request runs, one is being prepared, and one waits."""
    reading, go_on = threading.Event(), threading.Event()
    with Engine(session) as engine:
        read, advance = engine._loader._reader.read, engine._worker.advance

        def slow(number: int, prompt: Any, *rest: Any) -> Any:
            if prompt == "slow":
                reading.set()
                go_on.wait(60)
            return read(number, prompt, *rest)

        def defect(*given: Any) -> Any:
            if reading.is_set():
                raise Panic("a defect")
            return advance()

        monkeypatch.setattr(engine._loader._reader, "read", slow)
        if thread == "engine":
            monkeypatch.setattr(engine._worker, "advance", defect)
        going = engine.submit("The bank", "large", max_new_tokens=100, logit_bias={2: -100})
        next(going)
        slow_one, waits = engine.submit("slow", "small"), engine.submit("The bank")
        assert reading.wait(60)
        if thread == "loader":
            monkeypatch.setattr(engine._loader, "_prepare", defect)
            monkeypatch.setattr(engine._loader, "_timeout", defect)
            go_on.set()
        for one in (waits, slow_one, going):
            with pytest.raises(RunError, match="a defect"):
                one.result(60)
        go_on.set()
        assert engine.drain(60)
        assert not engine.alive
    assert not session._bank._users  # no adapter is in use


@pytest.mark.parametrize("then", ["is read", "is refused", "is cancelled"])
def test_a_request_that_is_being_prepared_at_a_defect_ends_once(
    session: AdapterSession, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    engine = Engine(session)
    requests, loader = engine._requests, engine._loader
    one = engine.submit("The bank", "small", max_new_tokens=2, n=2, temperature=1.0)
    with requests.lock:
        requests.preparing = requests.queue.pop()
    read = loader._reader.read

    def reads(*given: Any) -> Any:
        requests.defect(RuntimeError("a defect"))
        if then == "is refused":
            raise UsageError("of its prompt")
        return read(*given)

    monkeypatch.setattr(loader._reader, "read", reads)
    if then == "is cancelled":
        one.cancel()
        requests.defect(RuntimeError("a defect"))
    loader._prepare(one)
    with pytest.raises(RuntimeError, match="a defect"):
        one.result(0)
    stats = engine.stats()
    assert (stats.failed, stats.finished) == ({"RuntimeError": 1}, {})
    assert not requests.unfinished()
    assert not session._bank._users  # its adapter is not in use


def test_no_row_runs_with_another_adapter_after_a_failed_join(
    session: AdapterSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        joined = session.joined()
        stack.callback(joined.close)
        held = [stack.enter_context(session.hold(name)) for name in ("large", "large", "small")]
        for number, one in enumerate(held):
            joined.enter(number, one)
        joined.take_rows([0, 1, 2])
        joined.leave(0)
        joined.take_rows([0, 1, 2])
        join, asked = joined._join, [0]

        def fails_once(*given: Any) -> Any:
            asked[0] += 1
            if asked[0] == 1:
                raise MemoryError("a join")
            return join(*given)

        monkeypatch.setattr(joined, "_join", fails_once)
        joined.enter(3, held[2])
        with pytest.raises(MemoryError):
            joined.take_rows([3, 1, 2])
        with pytest.raises(RunError, match="could not be joined"):
            joined.run_with_ort_values(None, {})
        joined.leave(3)
        joined.take_rows([3, 1, 2])
        joined.enter(4, held[2])
        joined.take_rows([4, 1, 2])
        assert joined._lease is not None
        small = held[2].lease.rows[0]
        assert [row is small for row in joined._lease.rows] == [True, False, True]


def test_a_request_whose_adapter_cannot_join_does_not_affect_others(
    session: AdapterSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = TextGenerator(session).generate(["The bank"], "large", max_new_tokens=40)[0]
    with Engine(session) as engine:
        adapters = engine._worker._adapters
        join, failed = adapters._join, []

        def fails_once(*given: Any) -> Any:
            if len({id(lease.rows[0]) for lease, _ in given[0]}) > 1 and not failed:
                failed.append(True)
                raise MemoryError("a join")
            return join(*given)

        monkeypatch.setattr(adapters, "_join", fails_once)
        going = engine.submit("The bank", "large", max_new_tokens=40)
        next(going)
        with pytest.raises(MemoryError, match="a join"):
            engine.submit("The bank", "small", max_new_tokens=40).result(60)
        assert going.result(60).generations[0].token_ids == alone.token_ids


def test_the_default_of_max_new_tokens_is_the_room_of_a_row(
    session: AdapterSession,
) -> None:
    prompt = list(range(20, 60))
    each = position_bytes(session)
    alone = TextGenerator(session).generate([prompt], "large", max_new_tokens=20)[0]
    with Engine(session, max_rows=1, cache_budget=50 * each) as engine:
        for given in ({}, {"max_new_tokens": 20, "shorten": True}):
            got = engine.submit(prompt, "large", **given).result(60).generations[0]  # type: ignore[arg-type]
            assert got.token_ids == alone.token_ids[:10]
            assert got.finish_reason == "length"
        with pytest.raises(BudgetError):
            engine.submit(prompt, "large", max_new_tokens=20).result(60)
        with pytest.raises(BudgetError):  # no room for one token
            engine.submit(prompt + prompt, "large").result(60)


def test_a_graph_that_processes_prompts_in_parts_wrongly_is_refused(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_llama_bundle, tmp_path / "bundle")
    with edited_json(bundle / "loradeploy.json") as manifest:
        manifest["whole_prompts"] = True
    with AdapterSession(bundle) as session:
        with pytest.raises(UsageError, match="read in parts, as Engine does: use TextGenerator"):
            Engine(session)
        assert TextGenerator(session).generate(["A"], max_new_tokens=2)[0].token_ids


def test_an_idle_engine_returns_memory_once_and_answers_as_before(
    session: AdapterSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = threading.Semaphore(0)
    calls: list[int] = []

    def returned(worker: Worker) -> None:
        give_back(worker)
        rows = worker._beside
        if isinstance(rows, SlotRows) and sys.platform == "linux":
            assert not any(array.any() for array in rows._arrays.values())
        calls.append(1)
        idle.release()

    give_back = Worker.return_memory
    monkeypatch.setattr(Worker, "return_memory", returned)
    monkeypatch.setattr("loradeploy.runtime.engine.engine._IDLE", 0.02)
    with Engine(session, prefix_budget=0) as engine:
        assert not idle.acquire(timeout=0.2)  # nothing has run yet
        texts = []
        for _ in range(3):
            texts.append(engine.submit(LONG, "large", max_new_tokens=4).result(60).generations)
            assert idle.acquire(timeout=60)
            assert not idle.acquire(timeout=0.1)
        assert texts[0] == texts[1] == texts[2]
        assert engine.submit(LONG, None, max_new_tokens=4).result(60).generations != texts[0]
    assert len(calls) in (3, 4)


def test_slots_in_use_keep_their_memory(in_place: Path) -> None:
    with AdapterSession(in_place) as session:
        rows = SlotRows(DecoderGraph.of(session, 0), 3, 50)
        arrays = list(rows._arrays.values())
        for array in arrays:
            array[...] = 1
        (slot,) = rows.begin(1)._slots
        rows.return_memory()
        assert all((array == 1).all() for array in arrays)
        rows._free(slot)
        rows.return_memory()
        assert all(array.any() == (sys.platform != "linux") for array in arrays)
        assert all(array is own for array, own in zip(arrays, rows._arrays.values(), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="pages are only returned on Linux")
def test_pages_that_the_process_locked_stay_as_they_are() -> None:
    """A process that calls mlockall would lose its engine one second after the first request."""
    zeros = zeros_by_page((1, 4096), np.dtype("float32"))
    place, size = ctypes.c_void_p(zeros.ctypes.data), ctypes.c_size_t(zeros.nbytes)
    if ctypes.CDLL(None).mlock(place, size):
        pytest.skip("this process may lock no memory")
    zeros[...] = 1
    return_pages(zeros)
    assert (zeros == 1).all()
    ctypes.CDLL(None).munlock(place, size)
    return_pages(zeros)
    assert not zeros.any()
