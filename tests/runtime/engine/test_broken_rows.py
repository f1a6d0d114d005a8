"""Errors while rows of a batch are moved: requests fail, and none gets tokens of another."""

from __future__ import annotations

from typing import Any

import pytest

from loradeploy.errors import RunError
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.runtime.engine.rounds import Rounds

PROMPTS = {"small": [5, 6, 7], "large": [8, 9], None: [10, 11, 12], "partial": [13, 14]}
TOKENS = 12


@pytest.mark.parametrize("failing", ["rows", "adapters"])
@pytest.mark.parametrize("when", ["a request is cancelled", "a request ends", "one joins"])
def test_the_rest_of_a_batch_fails_and_later_requests_are_correct(
    session: AdapterSession, monkeypatch: pytest.MonkeyPatch, failing: str, when: str
) -> None:
    generator = TextGenerator(session)
    lone = [
        generator.generate([prompt], adapter, max_new_tokens=TOKENS)[0].token_ids
        for adapter, prompt in PROMPTS.items()
    ]
    assert len(set(lone)) == len(lone)
    made = Rounds(session)
    worker = made.engine._worker
    names, prompts = list(PROMPTS), list(PROMPTS.values())
    leaves = made.ask(prompts[:1], names[:1], 3 if when == "a request ends" else TOKENS)
    others = made.ask(prompts[1:], names[1:], TOKENS)
    made.round()
    rows = worker._batch._rows
    target: Any = worker._adapters if failing == "adapters" else rows
    method = "take_rows"
    if failing == "rows":
        joins = "take" if hasattr(rows, "take") else "join"
        method = joins if when == "one joins" else "move"

    def fails(*given: Any) -> None:
        monkeypatch.undo()
        if method == "move":
            rows.move(given[0][::-1][:2])  # half of the move succeeds
        raise MemoryError("no room for the rows")

    monkeypatch.setattr(target, method, fails)
    late = []
    if when == "a request is cancelled":
        leaves[0].cancel()
    if when == "one joins":
        late = made.ask(prompts[:1], names[:1], TOKENS)
    failed: dict[int, BaseException] = {}
    for _ in range(4):
        failed |= made.round()
    if (when, failing) == ("one joins", "adapters"):  # the others can run without it
        assert failed.keys() == {one.number for one in late}
        assert made.finish([*leaves, *others]) == lone
    else:
        # A step that fails is a failure of all requests in it.
        whole = when == "one joins" or (when, failing) == ("a request ends", "rows")
        expected = [*others, *(leaves if whole else ()), *late]
        assert failed.keys() == {one.number for one in expected}
        if not whole:
            (text,) = leaves[0].result(0).generations
            assert text.token_ids == lone[0][: len(text.token_ids)]
    assert all(isinstance(problem, MemoryError | RunError) for problem in failed.values())
    assert worker._batch.rows == 0
    again = made.finish(made.ask(prompts, names, TOKENS))
    assert again == lone


def test_a_request_that_fails_to_join_an_empty_batch_leaves_the_engine_usable(
    session: AdapterSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = TextGenerator(session)
    prompts = [PROMPTS["small"], PROMPTS["large"]]
    expected = [
        generator.generate([prompt], adapter, max_new_tokens=TOKENS)[0].token_ids
        for prompt, adapter in zip(prompts, ["small", "large"], strict=True)
    ]
    made = Rounds(session)
    rows: Any = made.engine._worker._batch._rows

    def fails(*_: Any) -> None:
        monkeypatch.undo()
        raise MemoryError("no room for the rows")

    monkeypatch.setattr(rows, "take" if hasattr(rows, "take") else "join", fails)
    (alone,) = made.ask(prompts[:1], ["small"], TOKENS)
    failed = made.round()
    assert {number: type(problem) for number, problem in failed.items()} == {
        alone.number: MemoryError
    }
    for prompt, adapter, tokens in zip(prompts, ["small", "large"], expected, strict=True):
        assert made.finish(made.ask([prompt], [adapter], TOKENS)) == [tokens]
