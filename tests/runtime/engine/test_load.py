"""Results under load: each request gets the same result as alone."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from loradeploy.errors import LoraDeployError, UnknownAdapterError
from loradeploy.runtime.engine.engine import Engine
from loradeploy.runtime.engine.submission import Completion, GenerationEvent, Submission
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import Generation, TextGenerator
from tests.conftest import MakeAdapter

RANKS = (4, 64, 8, 2, 16, 1)
WORDS = "The government said shares in the company fell after the bank reported growth"
SYSTEM = "You write the headlines of a paper: be brief. "
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "n": 3, "top_p": 0.9},
    {"num_beams": 3, "n": 2},
    {"logprobs": 2},
    {"repetition_penalty": 1.3, "logit_bias": {7: 3.0}},
    {"stop": "e"},
    {"presence_penalty": 0.5, "temperature": 0.7, "top_k": 20},
)


@dataclass(frozen=True)
class Asked:
    """A request and its result when it runs alone."""

    prompt: str
    adapter: Any
    seed: int
    options: dict[str, Any]
    alone: list[Generation] = field(default_factory=list)


@pytest.fixture(scope="module")
def mixed(tiny_llama: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    """Adapters of six ranks."""
    return {
        f"r{rank}": make_adapter(tiny_llama, r=rank, alpha=2 * rank, seed=rank) for rank in RANKS
    }


def opened(bundle: Path, adapters: dict[str, Path], **options: Any) -> AdapterSession:
    session = AdapterSession(bundle, **options)
    for name, path in adapters.items():
        session.register(name, path)
    return session


def requests(adapters: list[str], count: int, seed: int = 0) -> list[Asked]:
    """Return `count` requests of all kinds; some have a common prefix."""
    chance = random.Random(seed)
    specs = [None, *adapters, {adapters[0]: 0.5, adapters[1]: 0.7}]
    return [
        Asked(
            chance.choice(["", SYSTEM])
            + " ".join(chance.choices(WORDS.split(), k=chance.randint(1, 8))),
            chance.choice(specs),
            number,
            {**chance.choice(SETTINGS), "max_new_tokens": chance.randint(1, 8)},
        )
        for number in range(count)
    ]


def ask_alone(session: AdapterSession, asked: list[Asked]) -> None:
    """Run each request alone by a TextGenerator and store its result."""
    generator = TextGenerator(session)
    for one in asked:
        one.alone.extend(
            generator.generate([one.prompt], one.adapter, seed=one.seed, **one.options)
        )


def ids_of(text: Generation) -> list[list[int]]:
    """Return the token ids of all log-probabilities."""
    return [[part.token_id, *(t.token_id for t in part.top)] for part in text.logprobs or ()]


def same(found: Completion, one: Asked) -> bool:
    """Whether a result equals that of the request alone; log-probabilities up to rounding."""
    pairs = list(zip(found.generations, one.alone, strict=True))
    return all(
        (a.text, a.token_ids, a.finish_reason, a.choice, a.completion_tokens, ids_of(a))
        == (b.text, b.token_ids, b.finish_reason, b.choice, b.completion_tokens, ids_of(b))
        for a, b in pairs
    )


@pytest.mark.parametrize("way", ["grows", "in place"])
def test_200_requests_with_adapters_of_mixed_ranks_get_the_same_results_as_alone(
    way: str, tiny_llama_bundle: Path, in_place: Path, mixed: dict[str, Path]
) -> None:
    bundle = tiny_llama_bundle if way == "grows" else in_place
    count = 200 if way == "grows" else 40
    # Room for the largest adapter and little more: the others are evicted and reloaded constantly.
    with opened(bundle, mixed, host_budget=700_000) as session:
        asked = requests(list(mixed), count)
        ask_alone(session, asked)
        texts = {one.alone[0].text for one in asked}
        assert len(texts) > count / 3, "the requests are too alike to tell them apart"
        order = list(range(count))
        random.Random(1).shuffle(order)
        with Engine(session, max_waiting=count, prefill_chunk=16) as engine:
            found = {
                number: engine.submit(
                    asked[number].prompt,
                    asked[number].adapter,
                    seed=asked[number].seed,
                    scope=f"key {number % 3}",
                    **asked[number].options,
                )
                for number in order
            }
            wrong = [n for n in order if not same(found[n].result(120), asked[n])]
            assert not wrong
            stats = engine.stats()
        assert session.statistics.evictions > 0
    assert stats.submitted == count
    assert stats.failed == {}
    assert sum(stats.finished.values()) == sum(len(one.alone) for one in asked)
    assert stats.cached_tokens > 0
    assert max(stats.batch_sizes) > 4
    assert 0 < stats.one_adapter_steps < stats.steps


def test_requests_keep_their_adapter_when_its_name_is_replaced_or_unloaded(
    tiny_llama_bundle: Path, mixed: dict[str, Path]
) -> None:
    first, second = mixed["r4"], mixed["r64"]
    with opened(tiny_llama_bundle, {}) as session, Engine(session, max_waiting=100) as engine:
        session.load("old", first)
        session.load("new", second)
        generator = TextGenerator(session)
        lone = {
            name: generator.generate(["The bank"], name, max_new_tokens=40)[0].token_ids
            for name in ("old", "new")
        }
        assert lone["old"] != lone["new"]
        session.unload("old")
        session.unload("new")
        session.load("live", first)
        running = engine.submit("The bank", "live", max_new_tokens=40)
        next(running)  # it has started
        session.load("live", second, replace=True)
        later = engine.submit("The bank", "live", max_new_tokens=40)
        assert running.result(60).generations[0].token_ids == lone["old"]
        assert later.result(60).generations[0].token_ids == lone["new"]
        going = engine.submit("The bank", "live", max_new_tokens=40)
        next(going)
        session.unload("live")  # waits for it
        assert going.done
        assert going.result().generations[0].token_ids == lone["new"]
        with pytest.raises(UnknownAdapterError, match="live"):
            engine.submit("The bank", "live").result(60)


def test_reloads_cancellations_and_failures_do_not_affect_other_requests(
    tiny_llama_bundle: Path, mixed: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(mixed["r4"], broken)
    (broken / "adapter_model.safetensors").write_bytes(b"not an adapter")
    with opened(tiny_llama_bundle, mixed) as session:
        session.register("broken", broken)
        session.load("live", mixed["r2"])
        asked = requests(list(mixed), 40, seed=5)
        ask_alone(session, asked)
        live = {
            TextGenerator(session).generate(["The bank"], name, max_new_tokens=6)[0].token_ids
            for name in ("r2", "r16")
        }
        assert len(live) == 2
        with Engine(session, max_waiting=200, max_rows=6, prefill_chunk=8) as engine:

            def barred(made: tuple[int, ...]) -> None:
                if len(made) == 2:
                    raise ZeroDivisionError("a fault of the mask")

            def slow(made: tuple[int, ...]) -> None:
                time.sleep(0.05)  # the request must not end before it is cancelled

            others: list[Callable[[], Any]] = []
            found = []
            for number, one in enumerate(asked):
                found.append(engine.submit(one.prompt, one.adapter, seed=one.seed, **one.options))
                if number % 4 == 0:
                    name = ("r2", "r16")[number // 4 % 2]
                    session.load("live", mixed[name], replace=True)
                    others.append(engine.submit("The bank", "live", max_new_tokens=6).result)
                if number % 10 == 0:
                    engine.submit("Shares", "r64", max_new_tokens=60, allowed_tokens=slow).cancel()
                    failing = engine.submit("Shares", "r8", allowed_tokens=barred)
                    with pytest.raises(LoraDeployError):
                        engine.submit("Shares", "broken").result(60)
                    with pytest.raises(ZeroDivisionError):
                        failing.result(60)
            assert all(same(one.result(120), own) for one, own in zip(found, asked, strict=True))
            assert {each(60).generations[0].token_ids for each in others} <= live
            assert engine.drain(60)
            stats = engine.stats()
        assert stats.finished["cancelled"] == 4
        assert sum(stats.failed.values()) == 8
        assert stats.running == stats.waiting == 0
        for name in [*mixed, "broken", "live"]:
            session.unload(name)  # none is in use any more


def test_requests_of_many_threads_are_all_accounted_for(
    in_place: Path, mixed: dict[str, Path]
) -> None:
    """A short run of tools/soak_engine.py, with four client threads per row."""
    from tools.soak_engine import soak

    report = soak(in_place, mixed, seconds=3, max_rows=4)
    assert report.wrong == report.lost == 0
    assert report.answered > 0
    assert report.cancelled > 0
    assert report.answered + report.cancelled + report.refused == report.asked


def test_a_request_that_never_ends_is_reported_as_lost_once_the_engine_is_idle(
    in_place: Path, mixed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools.soak_engine import soak

    put = Submission.put

    def but_one(self: Submission, event: GenerationEvent) -> bool:
        return False if self.number == 7 else put(self, event)

    monkeypatch.setattr(Submission, "put", but_one)
    report = soak(in_place, mixed, seconds=0.1, max_rows=4)
    assert (report.lost, report.wrong) == (1, 0)
    assert report.answered + report.cancelled + report.refused + report.lost == report.asked
