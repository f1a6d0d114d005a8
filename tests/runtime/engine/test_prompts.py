"""Waiting prompts are processed together, with the same results as alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loradeploy.runtime.engine.prefix import BLOCK
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.runtime.engine.rounds import Rounds

ADAPTERS = ["small", None, "large", "partial", "small"]
SHORT = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18, 19], [20]]
SYSTEM = list(range(30, 30 + BLOCK))
LONG = list(range(60, 60 + 5 * BLOCK))


def alone(
    session: AdapterSession, prompts: Sequence[list[int]], adapters: Sequence[Any]
) -> list[tuple[int, ...]]:
    generator = TextGenerator(session)
    return [
        generator.generate([prompt], adapter, max_new_tokens=6)[0].token_ids
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]


def test_prompts_of_different_lengths_and_adapters_are_processed_in_one_run(
    session: AdapterSession,
) -> None:
    made = Rounds(session)
    submissions = made.ask(SHORT, ADAPTERS)
    made.round()
    assert made.prefills == 1
    found = made.finish(submissions)
    assert made.prefills == 1
    assert found == alone(session, SHORT, ADAPTERS)
    assert found != alone(session, SHORT, [None] * len(SHORT))


def test_prompts_join_running_rows_in_chunks_of_limited_size(session: AdapterSession) -> None:
    made = Rounds(session, prefill_chunk=12)
    first = made.ask(SHORT[:1], ["large"])
    made.round()
    rest = made.ask(SHORT[1:], ADAPTERS[1:])
    before = made.prefills
    made.round()
    # Prompts of 6, 2, 4 and 1 tokens, two at a time: 12 tokens with padding, then 8.
    assert [one.prompt_tokens is not None for one in rest] == [True, True, False, False]
    found = made.finish([*first, *rest])
    assert made.prefills == before + 2
    assert found == alone(session, SHORT, ["large", *ADAPTERS[1:]])


def test_a_common_prefix_is_processed_once_and_each_rest_separately(
    session: AdapterSession,
) -> None:
    """Together, padding would come after the prefix, where a sliding window counts it."""
    prompts = [[*SYSTEM, *own] for own in SHORT]
    made = Rounds(session)
    found = made.finish(made.ask(prompts, ["small"] * len(prompts)))
    assert found == alone(session, prompts, ["small"] * len(prompts))
    assert made.engine.stats().cached_tokens == BLOCK * (len(prompts) - 1)
    assert made.prefills == len(prompts)


def test_a_long_prompt_is_processed_in_larger_parts_while_no_request_is_decoding(
    session: AdapterSession,
) -> None:
    idle = Rounds(session, prefill_chunk=8, prefix_budget=0)
    found = idle.finish(idle.ask([LONG], ["large"]))
    assert idle.prefills == len(LONG) / 32 + 0.5  # the last part has 16 tokens
    busy = Rounds(session, prefill_chunk=8, prefix_budget=0)
    first = busy.ask(SHORT[:1], ["small"], tokens=60)
    busy.round()
    late = busy.ask([LONG], ["large"])
    assert busy.finish([*first, *late])[1] == found[0]
    assert busy.prefills == 1 + len(LONG) / 8
    assert found == alone(session, [LONG], ["large"])
    assert found != alone(session, [LONG], [None])


def test_short_prompts_take_turns_with_the_chunks_of_a_long_one(session: AdapterSession) -> None:
    made = Rounds(session, prefill_chunk=8)
    prompts = [LONG, *SHORT]
    submissions = made.ask(prompts, ["large", *ADAPTERS])
    made.round()
    made.round()
    assert [one.prompt_tokens is not None for one in submissions[:2]] == [True, True]
    assert made.finish(submissions) == alone(session, prompts, ["large", *ADAPTERS])
