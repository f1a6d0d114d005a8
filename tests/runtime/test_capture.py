"""Recorded and replayed runs: buffers with fixed addresses, adapters in slots, one per shape.

The CPU provider records nothing and ignores the number of a run. With its row of the provider table
changed, these tests run the same code there, in buffers with fixed addresses. Real replays are
tested on WebGPU (tests/runtime/devices/test_webgpu.py); for CUDA, sessions are opened on stubs
(tests/export/test_placement.py).
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.runtime.adapters.filling import Filler
from loradeploy.runtime.capture import replays
from loradeploy.runtime.capture.pool import CachePool
from loradeploy.runtime.decoding.caches import slots
from loradeploy.serve.metrics import Metrics
from tests.runtime.feeds import feeds, random_ids
from tests.runtime.steps import logits_of_steps
from tests.tolerances import tolerance

pytestmark = pytest.mark.usefixtures("recording")
PROMPTS = ["The news", "Shares fell today again", "x"]
ROWS, STEPS = 2, 5
TOKENS = random_ids(ROWS, STEPS)
# Adapters of batches of three rows.
BATCHES: tuple[Any, ...] = (
    None,
    "large",
    "small",
    "partial",
    ["small", None, "large"],
    ["partial", "small", "large"],
    {"small": 0.5, "partial": 0.7},
)


@pytest.fixture(scope="module")
def bundles(
    tiny_llama_bundle: Path, in_place: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """Decoder bundles with a cache of fixed size."""
    slots = tmp_path_factory.mktemp("captured") / "slots"
    ld.export(tiny_llama_bundle, slots, attention="gqa", layout="slots")
    return {"slots": slots, "rows": in_place}


Pair = tuple[ld.AdapterSession, ld.AdapterSession]


@pytest.fixture(params=["slots", "rows"])
def pair(
    request: pytest.FixtureRequest, bundles: Mapping[str, Path], llama_adapters: dict[str, Path]
) -> Iterator[Pair]:
    """A plain session and a recording one on the same bundle."""
    path = bundles[request.param]
    with ld.AdapterSession(path) as usual, captures(path) as captured:
        for session in (usual, captured):
            for name, adapter in llama_adapters.items():
                session.load(name, adapter)
        yield usual, captured


def captures(path: Path, **options: Any) -> ld.AdapterSession:
    return ld.AdapterSession(path, ["cpu"], capture_graphs=True, **options)


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which the number of every run is appended."""
    seen: list[int] = []
    made = replays._options

    def noted(number: int) -> Any:
        options = made(number)
        assert options.get_run_config_entry("gpu_graph_id") == str(number)
        seen.append(number)
        return options

    monkeypatch.setattr(replays, "_options", noted)
    return seen


def slots_of(session: ld.AdapterSession) -> dict[Any, Any]:
    assert session._replays is not None
    return session._replays._slots._sets


def test_generated_text_is_that_of_a_session_without_recording(pair: Pair) -> None:
    usual, captured = (ld.TextGenerator(session) for session in pair)
    texts = []
    for adapters in BATCHES:
        expected, found = (
            [answer.text for answer in generator.generate(PROMPTS, adapters, max_new_tokens=10)]
            for generator in (usual, captured)
        )
        assert found == expected, adapters
        texts.append(found)
    assert len({str(found) for found in texts}) == len(BATCHES)  # each has an effect
    counts = []
    for _ in range(3):  # only steps are recorded, not repeated prompts of the same length
        for adapters in BATCHES:
            captured.generate(PROMPTS, adapters, max_new_tokens=3)
        counts.append(pair[1].captured)
    # The base, ranks 64, 8 and 16 (of the blend), and mixed batches.
    assert counts == [5, 5, 5]
    assert pair[0].captured is None


def test_every_set_of_shapes_is_recorded_at_its_second_run(pair: Pair, numbers: list[int]) -> None:
    _, session = pair
    runs: tuple[Any, ...] = (None, None, None, "large", "large", "small", "small", "partial", None)
    logits_of_steps(session, np.resize(TOKENS, (ROWS, len(runs))), runs)
    # The base, then rank 64, then ranks 4 and 8, which use slots of the same size.
    assert numbers == [-1, 1, 1, -1, 2, -1, 3, 3, 1]
    mixed = ["small", None]
    logits_of_steps(session, TOKENS, [mixed, mixed, "small", "small", mixed])
    assert numbers[len(runs) :] == [-1, 4, 3, 3, 4]
    assert session.captured == 4


def test_a_swap_writes_into_slots_with_fixed_addresses(pair: Pair) -> None:
    _, session = pair

    def addresses() -> dict[str, int]:
        assert session._replays is not None
        found = {
            f"{size} {name}": value.data_ptr()
            for size, own in slots_of(session).items()
            for name, value in own.values.items()
        }
        for recording in session._replays._recordings.values():
            for name, value in {**recording.feeds, **recording.outputs}.items():
                found[f"{recording.number} {name}"] = value.data_ptr()
        return found

    assert session.statistics.device_bytes == 0
    logits_of_steps(session, TOKENS, ["small", "small", "partial", "small", "partial"])
    before, memory = addresses(), session.statistics.device_bytes
    assert list(slots_of(session)) == [(1, 8)] and memory > 0
    assert {"1 input_ids", "1 attention_mask", "1 position_ids", "1 logits"} <= before.keys()
    for adapters in ("small", {"small": 0.5}, "partial"):
        ((own),) = slots_of(session).values()
        held = own.values["model.layers.0.self_attn.q_proj.lora_B"].numpy().copy()
        logits_of_steps(session, TOKENS, [adapters] * STEPS)
        assert addresses() == before
        now = own.values["model.layers.0.self_attn.q_proj.lora_B"].numpy()
        assert np.abs(now - held).max() > 0
    assert session.statistics.device_bytes == memory


def test_a_smaller_adapter_overwrites_a_larger_one_completely(
    pair: Pair, llama_adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # `small` has factors of rank 4 for all modules, `partial` of rank 8 for two kinds of them.
    runs = ["small", "partial", "small", "small", "partial"]
    expected, found = (logits_of_steps(own, TOKENS, runs) for own in pair)
    assert np.abs(found - expected).max() <= tolerance("rows")

    def careless(self: Filler, arrays: Any, slot: int, resident: Any) -> None:
        for name, values in ({} if resident is None else resident.host).items():
            arrays[name][slot][tuple(slice(size) for size in values.shape[1:])] = values[0]

    monkeypatch.setattr(Filler, "write", careless)
    with captures(pair[1].path) as stale:
        for name in ("small", "partial"):
            stale.load(name, llama_adapters[name])
        wrong = logits_of_steps(stale, TOKENS, runs)
    assert np.abs(wrong[0] - expected[0]).max() <= tolerance("rows")
    assert np.abs(wrong[1] - expected[1]).max() > 0.1


def test_the_base_is_recorded_without_side_inputs(pair: Pair) -> None:
    usual, session = pair
    expected = logits_of_steps(usual, TOKENS, [None] * STEPS)
    first = logits_of_steps(session, TOKENS, [None] * STEPS)
    assert not slots_of(session)
    logits_of_steps(session, TOKENS, ["large"] * STEPS)
    assert np.array_equal(logits_of_steps(session, TOKENS, [None] * STEPS), first)
    assert np.abs(first - expected).max() <= tolerance("rows")


def test_results_are_copies_that_later_runs_do_not_change(pair: Pair) -> None:
    _, session = pair
    inputs = [feeds(session.manifest, random_ids(1, 1, seed=seed)) for seed in range(3)]
    values = [session.run_with_ort_values(["logits"], own, "small")[0] for own in inputs]
    arrays = [session.run(["logits"], own, "small")[0] for own in inputs]
    assert session.captured == 1
    for value, array, own in zip(values, arrays, inputs, strict=True):
        (again,) = session.run(["logits"], own, "small")
        assert np.array_equal(value.numpy(), array) and np.array_equal(array, again)
    assert not np.array_equal(arrays[1], arrays[2])


def test_prompts_are_not_recorded_even_with_repeated_lengths(
    pair: Pair, numbers: list[int]
) -> None:
    _, session = pair
    for _ in range(3):
        session.run(["logits"], feeds(session.manifest, random_ids(2, 6)), "small")
    assert numbers == [-1] * 3 and session.captured == 0


def test_threads_take_turns_each_with_its_own_adapter(pair: Pair) -> None:
    usual, session = pair
    adapters: list[Any] = ["small", "large", None, ["partial", "small"]]
    expected = [logits_of_steps(usual, TOKENS, [own] * STEPS) for own in adapters]
    errors: list[float] = []

    def work(number: int) -> None:
        for _ in range(4):
            found = logits_of_steps(session, TOKENS, [adapters[number]] * STEPS)
            errors.append(float(np.abs(found - expected[number]).max()))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(adapters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 4 * len(adapters) and max(errors) <= tolerance("rows")


def test_a_later_generation_reuses_the_cache_of_an_earlier_one(pair: Pair) -> None:
    _, session = pair

    def addresses(cache: Any) -> list[int]:
        return [value.data_ptr() for value in cache.inputs.values()]

    first, second = (session.empty_cache(2) for _ in range(2))
    for cache in (first, second):
        cache.make_room(10, 20)
        assert cache.length == 128  # the positions of the model
    before = addresses(first)
    assert before != addresses(second)
    for value in first.inputs.values():
        value.update_inplace(np.full(value.shape(), 7, np.float32))
    del first, cache, value
    third = session.empty_cache(2)
    third.make_room(90)
    assert addresses(third) == before
    assert all(not value.numpy().any() for value in third.inputs.values())


def test_the_number_of_recordings_is_limited(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, session = pair
    monkeypatch.setattr(replays, "MOST_RECORDINGS", 1)
    runs: list[Any] = [None, None, "small", "small", "small"]
    expected, found = (logits_of_steps(own, TOKENS, runs) for own in pair)
    assert np.abs(found - expected).max() <= tolerance("rows")
    assert session.captured == 1
    assert session.capture_statistics is not None
    seen = dataclasses.asdict(session.capture_statistics)
    # The second run of the base was recorded; the last two runs of the adapter were repeats.
    assert seen == {"recorded": 1, "made": 1, "replayed": 0, "refused": 2}
    assert pair[0].capture_statistics is None
    figures = Metrics()
    figures.watch_captures(lambda: session.capture_statistics)
    shown = figures.text().decode()
    for name, key in (
        ("captures", "made"),
        ("replays", "replayed"),
        ("captures_refused", "refused"),
    ):
        assert f"loradeploy:graph_{name}_total {float(seen[key])}\n" in shown
    assert [record.message for record in caplog.records] == [
        "1 runs of different shapes or buffers are captured: further ones are not"
    ]


def test_an_engine_uses_recorded_runs(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    # On the host, rows are in slots and no two steps have equal shapes; on a device they have.
    monkeypatch.setattr(slots, "on_host", lambda session: session.captured is None)
    usual, captured = pair
    answers = []
    for session in (usual, captured):
        with ld.Engine(session) as engine:
            waiting = [
                engine.submit(prompt, adapter=name, max_new_tokens=8)
                for prompt, name in zip(PROMPTS, ("small", None, "large"), strict=True)
            ]
            answers.append([one.result().generations[0].text for one in waiting])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == len(PROMPTS)
    seen = captured.capture_statistics
    assert seen is not None and seen.replayed > 0 and seen.made >= seen.recorded > 0, seen
    assert seen.refused == 0


def test_heads_of_classifiers_are_in_slots_too(
    tiny_bert_bundle: Path, bert_adapters: dict[str, Path]
) -> None:
    logits = []
    ids = np.arange(12).reshape(3, 4) + 5
    feeds = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    for session in (ld.AdapterSession(tiny_bert_bundle), captures(tiny_bert_bundle)):
        for name in ("small", "large"):
            session.load(name, bert_adapters[name])
        batches: list[Any] = [["small", None, "large"], "large", "small", None]
        logits.append([session.run(["logits"], feeds, adapters=one)[0] for one in batches * 2])
    found, expected = np.array(logits[1]), np.array(logits[0])
    assert np.abs(found - expected).max() <= tolerance("rows")
    assert np.abs(expected[1] - expected[2]).max() > 0.05
    assert session.captured == 4  # mixed, one of rank 16, one of rank 4, the base


def test_slots_beyond_the_budget_are_refused(
    bundles: Mapping[str, Path], llama_adapters: dict[str, Path]
) -> None:
    with captures(bundles["rows"], device_budget=100_000) as session:
        for name, adapter in llama_adapters.items():
            session.load(name, adapter)
        logits_of_steps(session, TOKENS, ["small"] * STEPS)
        with pytest.raises(ld.BudgetError, match="2 slots of rank 64 take .* device_budget is"):
            logits_of_steps(session, TOKENS, [["small", "large"]] * STEPS)


def test_a_graph_with_branches_is_refused(tiny_llama_bundle: Path, tmp_path: Path) -> None:
    ld.export(tiny_llama_bundle, tmp_path / "branches", branches=True)
    with pytest.raises(ld.UsageError, match="`capture_graphs`: .* has branches, .* --no-branches"):
        captures(tmp_path / "branches")


def test_text_generation_with_a_growing_cache_is_refused(tiny_llama_bundle: Path) -> None:
    match = "--attention gqa, whose cache stays in place"
    with captures(tiny_llama_bundle) as session, pytest.raises(ld.UsageError, match=match):
        ld.TextGenerator(session)


def test_contradictory_provider_options_are_refused(tiny_llama_bundle: Path) -> None:
    with pytest.raises(ld.UsageError, match="`capture_graphs` sets records of CPUExec"):
        ld.AdapterSession(tiny_llama_bundle, [("cpu", {"records": "0"})], capture_graphs=True)


def test_a_provider_that_records_nothing_is_refused(
    tiny_llama_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    message = "CPUExecutionProvider captures no runs here: give one of cuda, webgpu"
    with pytest.raises(ld.UsageError, match=message):
        captures(tiny_llama_bundle)


def test_buffers_can_be_returned_while_others_are_borrowed() -> None:
    """The garbage collector can run at any allocation, on a thread that holds the lock."""
    pool = CachePool(None, None)
    borrowed = pool.borrow(1, 256, 4)
    value = borrowed.put("a", np.ones(1, np.float32), ("cpu", 0))
    with pool._lock:
        del borrowed
    assert pool.borrow(1, 256, 4).put("a", np.zeros(1, np.float32), ("cpu", 0)) is value


def test_unused_buffers_are_kept_up_to_the_peak_of_use() -> None:
    class Runs:
        def __init__(self) -> None:
            self.gone: list[int] = []

        def forget(self, addresses: Collection[int]) -> None:
            self.gone += addresses

    runs = Runs()
    pool = CachePool(None, runs.forget)

    def used_once(rows: int) -> int:
        borrowed = pool.borrow(rows, 256, 4 * rows)
        return borrowed.put("a", np.ones(rows, np.float32), ("cpu", 0)).data_ptr()

    largest = used_once(8)
    addresses = [used_once(rows) for rows in (2, 3, 4)]
    # 8, 2 and 3 rows are unused when 4 are needed: 17 of 16 rows, so the oldest is freed.
    assert runs.gone == [largest] and pool.nbytes == 4 * (2 + 3 + 4)
    assert [used_once(rows) for rows in (2, 3, 4)] == addresses
    for rows in range(9, 40):
        used_once(rows)
        assert pool.nbytes <= 2 * 4 * rows


def test_recordings_are_dropped_with_their_buffers(pair: Pair, numbers: list[int]) -> None:
    usual, session = pair
    steps: list[Any] = ["small"] * 3
    expected = [logits_of_steps(usual, random_ids(rows, 3), steps) for rows in (1, 2, 4, 1)]
    found = [logits_of_steps(session, random_ids(rows, 3), steps) for rows in (1, 2, 4, 1)]
    for own, theirs in zip(found, expected, strict=True):
        assert np.abs(own - theirs).max() <= tolerance("rows")
    # Unused buffers of 1 and 2 rows are kept when 4 rows are needed, and freed after 3 more sizes.
    assert numbers == [-1, 1, 1, -1, 2, 2, -1, 3, 3, 1, 1, 1] and session.captured == 3
    logits_of_steps(session, random_ids(3, 3), steps)
    assert session.captured == 3 and session._caches is not None
    assert session._caches.nbytes <= 2 * 4 * _bytes_of_a_row(session)
    again = logits_of_steps(session, random_ids(2, 3), steps)
    assert np.abs(again - expected[1]).max() <= tolerance("rows")
    assert numbers[-3:] == [-1, 5, 5]  # recorded again: numbers are not reused


def _bytes_of_a_row(session: ld.AdapterSession) -> int:
    cache = session.empty_cache(1)
    cache.make_room(1)
    return sum(value.numpy().nbytes for value in cache.inputs.values())
