"""Who is next: scopes and adapters take turns by the work that they ask for."""

from __future__ import annotations

from loradeploy.runtime.engine.queue import FairQueue


def order(queue: FairQueue[str], most: int = 100) -> str:
    return "".join(queue.pop() for _ in range(min(most, len(queue))))


def test_scopes_take_turns_and_in_each_its_adapters() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in "aaaa":
        queue.push(item, "one", "x", 1)
    queue.push("b", "one", "y", 1)
    for item in "cc":
        queue.push(item, "two", "x", 1)
    assert order(queue) == "acbcaaa"


def test_a_scope_that_asks_for_more_work_gets_fewer_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(4):
        queue.push("L", "long", None, 3)
        queue.push("s", "short", None, 1)
    assert order(queue, 5) == "LsssL"


def test_who_asks_one_at_a_time_does_not_go_before_those_that_wait() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(4):
        queue.push("w", "waits", None, 1)
    got = ""
    for _ in range(6):
        if "s" not in queue:
            queue.push("s", "single", None, 1)
        got += queue.pop()
    assert got.count("w") == got.count("s") == 3


def test_nobody_saves_up_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(20):
        queue.push("w", "waits", None, 1)
    order(queue, 10)
    for _ in range(10):
        queue.push("n", "new", None, 1)
    assert order(queue, 6).count("w") >= 2


def test_the_scope_with_most_gives_way_to_one_with_fewer() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("m1", "m2", "m3"):
        queue.push(item, "many", None, 1)
    queue.push("f1", "few", None, 1)
    assert queue.shed("many") is None
    assert queue.shed("few") == "m3"
    assert queue.shed("few") is None
    assert list(queue) == ["m1", "m2", "f1"]
    assert queue.remove("m1")
    assert not queue.remove("m1")
