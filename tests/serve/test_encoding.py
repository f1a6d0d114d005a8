"""The encoder queue: requests share runs of the graph and get the same results as alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loradeploy.errors import DeadlineError, EngineClosedError, EngineFullError, UsageError
from loradeploy.runtime.tasks.classification import TextClassifier
from loradeploy.serve.encoding import EncoderQueue, RowWork, rows_are_independent
from loradeploy.serve.keys import ApiKey
from loradeploy.serve.problems import RequestError
from loradeploy.serve.settings import ServeLimits
from tests.conftest import MakeAdapter
from tests.serve.answers import figure
from tests.serve.conftest import Running, serving
from tests.tolerances import tolerance

ONE, OTHER = ApiKey("one", "a-key-of-one-0123456789"), ApiKey("other", "a-key-of-other-01234")
Adapters = Any


class FakeSession:
    """The parts of a session that the queue uses: independence of rows, and adapter changes."""

    def __init__(self, *operators: str) -> None:
        self.placement = {"CPUExecutionProvider": dict.fromkeys(operators, 1)}
        self.count = 0
        self.texts = SimpleNamespace(
            counts=lambda adapter: (self.count,),
            have_moved=lambda adapter, counts: counts != (self.count,),
        )


class Recorder:
    """Work whose runs are recorded; a run waits while `go_on` is cleared."""

    def __init__(self) -> None:
        self.runs: list[tuple[list[Any], Any]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def work(self, group: object = "g", prepare: Callable[[], Any] = lambda: None) -> Any:
        return RowWork(group, prepare, self._run)

    def _run(self, rows: Sequence[Any], adapters: Adapters) -> list[Any]:
        self.runs.append((list(rows), adapters))
        assert self.go_on.wait(30)
        if "bad" in rows:
            raise UsageError("a bad row")
        return [f"{row}!" for row in rows]


def queue_of(session: FakeSession | None = None, **limits: Any) -> EncoderQueue:
    limits.setdefault("batch_delay", 0.05)
    return EncoderQueue(
        ServeLimits(**limits),
        session or FakeSession("MatMul"),  # type: ignore[arg-type]
        on_run=lambda: None,
    )


def run(check: Any) -> None:
    asyncio.run(asyncio.wait_for(check(), 60))


async def until(true: Callable[[], Any]) -> None:
    while not true():
        await asyncio.sleep(0.005)


def test_rows_of_several_requests_and_adapters_share_a_run() -> None:
    async def check() -> None:
        queue, made = queue_of(), Recorder()
        answers = await asyncio.gather(
            queue.run(made.work(), ["a", "b"], "sport", ONE),
            queue.run(made.work(prepare=lambda: "usage"), ["c"], None, OTHER),
            queue.run(made.work("another group"), ["d"], None, ONE),
        )
        assert answers == [(None, ["a!", "b!"]), ("usage", ["c!"]), (None, ["d!"])]
        assert made.runs == [(["a", "b", "c"], ["sport", "sport", None]), (["d"], None)]

    run(check)


def test_an_error_fails_only_its_own_request() -> None:
    async def check() -> None:
        queue, made = queue_of(), Recorder()

        def refused() -> None:
            raise RequestError(400, "too long")

        good, bad, early = await asyncio.gather(
            queue.run(made.work(), ["a"], None, ONE),
            queue.run(made.work(), ["bad"], "sport", ONE),
            queue.run(made.work(prepare=refused), ["c"], None, OTHER),
            return_exceptions=True,
        )
        assert good == (None, ["a!"])
        assert str(bad) == "a bad row"
        assert (type(early), "c" in str(made.runs)) == (RequestError, False)

    run(check)


def test_requests_of_many_rows_are_interleaved_and_keys_take_turns() -> None:
    async def check() -> None:
        queue, made = queue_of(max_rows=2), Recorder()
        done: list[str] = []

        async def asked(name: str, rows: int, key: ApiKey) -> None:
            _, results = await queue.run(made.work(), [name] * rows, None, key)
            assert results == [f"{name}!"] * rows
            done.append(name)

        await asyncio.gather(asked("large", 7, ONE), asked("x", 2, ONE), asked("y", 2, OTHER))
        assert done == ["y", "x", "large"]
        assert max(len(rows) for rows, _ in made.runs) == 2
        assert len(made.runs) == 6  # 11 rows

    run(check)


def test_a_request_whose_adapter_changes_meanwhile_runs_again() -> None:
    async def check() -> None:
        session, made = FakeSession("MatMul"), Recorder()
        queue = queue_of(session, max_rows=1)
        prepared = []

        def prepare() -> int:
            prepared.append(session.count)
            return session.count

        def changing(rows: Sequence[str], adapters: Adapters) -> list[int]:
            seen = session.count
            if len(made.runs) in changes:
                session.count += 1
            made.runs.append(([], adapters))
            return [seen]

        changes = {0}  # after the first of two rows
        work = RowWork("g", prepare, changing)
        assert await queue.run(work, ["a", "b"], "sport", ONE) == (1, [1, 1])
        assert prepared == [0, 1]
        changes = set(range(100))
        with pytest.raises(RequestError, match="is being replaced"):
            await queue.run(work, ["a", "b"], "sport", ONE)

    run(check)


def test_rows_that_depend_on_each_other_are_not_run_together() -> None:
    shared = FakeSession("MatMul", "DynamicQuantizeMatMul")
    assert not rows_are_independent(shared)  # type: ignore[arg-type]
    assert not rows_are_independent(FakeSession())  # type: ignore[arg-type]

    async def check() -> None:
        queue, made = queue_of(shared), Recorder()
        requests = [queue.run(made.work(), [name], None, ONE) for name in "abc"]
        assert [answer for _, answer in await asyncio.gather(*requests)] == [["a!"], ["b!"], ["c!"]]
        assert [rows for rows, _ in made.runs] == [["a"], ["b"], ["c"]]

    run(check)


def test_the_queue_has_room_for_every_key_and_requests_have_a_deadline() -> None:
    async def check() -> None:
        queue = queue_of(max_waiting=4, request_timeout=2.0, batch_delay=0.001)
        made = Recorder()
        made.go_on.clear()

        def asked(key: ApiKey) -> asyncio.Task[Any]:
            return asyncio.create_task(queue.run(made.work(object()), ["a"], None, key))

        first = asked(ONE)
        await until(lambda: queue.running)
        waiting = [asked(ONE), asked(ONE)]
        await asyncio.sleep(0)
        assert (queue.running, queue.waiting) == (1, 2)
        with pytest.raises(EngineFullError, match="2 requests of this API key are waiting"):
            await queue.run(made.work(), ["a"], None, ONE)
        other = asked(OTHER)
        for late in (first, *waiting, other):  # the first is running, and is late too
            with pytest.raises(DeadlineError):
                await late
        assert (queue.running, queue.waiting) == (1, 0)
        made.go_on.set()
        assert await queue.run(made.work(), ["b"], None, ONE) == (None, ["b!"])
        assert [rows for rows, _ in made.runs] == [["a"], ["b"]]  # none for requests that ended
        with pytest.raises(UsageError):
            await queue.run(made.work(), ["bad"], None, ONE)
        queue.closed = True
        with pytest.raises(EngineClosedError):
            await queue.run(made.work(), ["bad"], None, ONE)

    run(check)


# -- over HTTP ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(
    tiny_bert: Path, tiny_bert_bundle: Path, make_adapter: MakeAdapter
) -> Iterator[Running]:
    """A server of the tiny BERT as a classifier with two adapters and a batch delay."""
    adapters = {
        name: make_adapter(tiny_bert, r=rank, seed=rank, task="sequence-classification", scale=0.3)
        for name, rank in (("small", 2), ("large", 8))
    }
    with serving(tiny_bert_bundle, adapters=adapters, batch_delay=0.3, max_rows=4) as running:
        yield running


def test_concurrent_requests_share_runs_and_get_their_own_adapters_answers(
    classifier: Running,
) -> None:
    library = TextClassifier(classifier.service.session)
    texts = ["Shares fell.", "The team won the cup in extra time", "A", "It rains", "B", "It is"]
    jobs = [(name, text) for name in ("small", "large") for text in texts]
    alone = {(name, text): library(text, name)[0].scores for name, text in jobs}
    http = classifier.http()
    before = figure(classifier, "encoder_runs_total")

    def ask(job: tuple[str, str]) -> dict[str, float]:
        answer = http.post("/v1/classify", json={"model": job[0], "input": job[1]})
        found: dict[str, float] = answer.json()["data"][0]["scores"]
        return found

    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(ask, jobs))
    # 12 texts, at most four per run, even if some arrive late.
    assert 3 <= figure(classifier, "encoder_runs_total") - before < len(jobs)
    worst = max(
        abs(scores[label] - alone[job][label])
        for job, scores in zip(jobs, answers, strict=True)
        for label in scores
    )
    assert worst <= tolerance("rows")
    for text in texts:  # the two adapters give different results
        small, large = (np.array(list(alone[name, text].values())) for name in ("small", "large"))
        assert np.abs(small - large).max() > 0.01
