"""The fair queue: scopes and adapters take turns in proportion to their requested work."""

from __future__ import annotations

from loradeploy.runtime.engine.queue import FairQueue


def order(queue: FairQueue[str], most: int = 100) -> str:
    return "".join(queue.pop() for _ in range(min(most, len(queue))))


def test_scopes_take_turns_and_so_do_the_adapters_of_a_scope() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in "aaaa":
        queue.push(item, "one", "x", 1)
    queue.push("b", "one", "y", 1)
    for item in "cc":
        queue.push(item, "two", "x", 1)
    assert order(queue) == "acbcaaa"


def test_a_scope_that_requests_more_work_gets_fewer_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(4):
        queue.push("L", "long", None, 3)
        queue.push("s", "short", None, 1)
    assert order(queue, 5) == "LsssL"


def test_a_scope_with_one_request_at_a_time_does_not_overtake_waiting_ones() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(4):
        queue.push("w", "waits", None, 1)
    got = ""
    for _ in range(6):
        if "s" not in queue:
            queue.push("s", "single", None, 1)
        got += queue.pop()
    assert got.count("w") == got.count("s") == 3


def test_unused_turns_are_not_saved() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(20):
        queue.push("w", "waits", None, 1)
    order(queue, 10)
    for _ in range(10):
        queue.push("n", "new", None, 1)
    assert order(queue, 6).count("w") >= 2


def test_the_scope_with_most_requests_is_displaced_by_one_with_fewer() -> None:
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


def flows(queue: FairQueue[str]) -> int:
    return sum(len(scope.flows) for scope in queue._scopes.values())


def test_a_returning_scope_with_a_debt_is_served_despite_many_new_ones() -> None:
    for scopes in (False, True):
        queue: FairQueue[str] = FairQueue()

        def push(item: str, name: str, queue: FairQueue[str] = queue, apart: bool = scopes) -> None:
            queue.push(item, name if apart else None, "x" if apart else name, 50)

        push("first", "regular")
        push("other", "other")
        assert queue.pop() == "first"
        push("again", "regular")
        served = []
        for number in range(1000):
            push(f"new {number}", f"new {number}")
            served.append(queue.pop())
            if served[-1] == "again":
                break
        assert 1 < len(served) < 6, served


def test_flows_without_a_debt_are_forgotten() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(2000):
        queue.push("item", None, number, 10)
        queue.pop()
        queue.push("item", number, None, 10)
        queue.pop()
    assert flows(queue) == 0
    queue.push("waits", None, "large", 1000)
    queue.push("waits", None, "large", 1000)
    queue.pop()
    for number in range(200):
        queue.push("item", None, number, 10)
        queue.pop()
        assert flows(queue) < 50
