"""The adapter bank: many adapters in little memory, names, budgets, pinning, and blends."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from loradeploy.adapter.heads import Head
from loradeploy.errors import AdapterError, BudgetError, UnknownAdapterError, UsageError
from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter, once
from tests.runtime.feeds import Ids, logits, random_ids
from tests.tolerances import tolerance

IDS = random_ids(3, 5)
PATIENCE = 60.0  # seconds; longer means a deadlock
COUNT = 12


@pytest.fixture(scope="session")
def tenants(tiny_llama: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    """A dozen adapters of rank 2 to 8."""
    return {
        f"tenant{seed}": make_adapter(tiny_llama, seed=seed, r=2 * (1 + seed % 4), alpha=8)
        for seed in range(COUNT)
    }


@pytest.fixture(scope="session")
def alone(tiny_llama_bundle: Path, tenants: dict[str, Path]) -> dict[str | None, np.ndarray]:
    """The logits of each adapter, from a session with room for all."""
    session = AdapterSession(tiny_llama_bundle)
    answers: dict[str | None, np.ndarray] = {None: logits(session, IDS)}
    for name, path in tenants.items():
        session.load(name, path)
        answers[name] = logits(session, IDS, name)
    return answers


@pytest.fixture
def small(tiny_llama_bundle: Path, tenants: dict[str, Path]) -> Callable[..., AdapterSession]:
    """A function: sessions with all names registered and room for about four of the largest."""
    room = AdapterSession(tiny_llama_bundle)
    room.load("largest", tenants["tenant3"])
    budget = 4 * room.statistics.host_bytes

    def make(bundle: Path = tiny_llama_bundle, **options: int) -> AdapterSession:
        session = AdapterSession(bundle, **{"host_budget": budget, **options})
        for name, path in tenants.items():
            session.register(name, path)
        return session

    return make


def exported(model: Path, shared: Path, layout: str) -> Path:
    """A bundle with the given layout, exported once."""
    return once(shared / f"bank-{layout}", lambda out: export(model, out, layout=layout))


def worst(session: AdapterSession, ids: Ids, rows: list[str | None], expected: dict) -> float:
    """Return the largest difference between a mixed batch and each of its rows alone."""
    got = logits(session, ids, rows)
    return max(float(np.abs(got[i] - expected[name][i]).max()) for i, name in enumerate(rows))


@pytest.mark.parametrize("layout", ["slots", "rows"])
def test_a_batch_that_needs_more_than_the_budget_releases_it_afterwards(
    layout: str,
    tiny_llama: Path,
    shared: Path,
    small: Callable[..., AdapterSession],
    alone: dict[str | None, np.ndarray],
) -> None:
    budget = 20_000
    session = small(exported(tiny_llama, shared, layout), device_budget=budget)
    rows = [None, "tenant0", "tenant1"]
    with session.hold(rows):
        assert session.statistics.device_bytes > budget
    assert session.statistics.device_bytes <= budget
    assert worst(session, IDS, rows, alone) <= tolerance("rows")


# -- names -------------------------------------------------------------------------------------


def test_a_registered_adapter_is_read_at_its_first_use(
    small: Callable[..., AdapterSession], alone: dict[str | None, np.ndarray]
) -> None:
    session = small()
    assert session.statistics.registered == COUNT
    assert session.statistics.host_bytes == 0
    assert session.adapters["tenant1"] is None  # its digest is still unknown
    assert np.array_equal(logits(session, IDS, "tenant1"), alone["tenant1"])
    assert session.adapters["tenant1"].startswith("sha256:")
    assert (session.statistics.hits, session.statistics.misses) == (0, 1)
    logits(session, IDS, "tenant1")
    assert (session.statistics.hits, session.statistics.misses) == (1, 1)


def test_a_registered_name_is_taken_until_it_is_replaced(
    small: Callable[..., AdapterSession],
    tenants: dict[str, Path],
    alone: dict[str | None, np.ndarray],
) -> None:
    session = small()
    with pytest.raises(UsageError, match="another adapter is loaded as 'tenant1'"):
        session.register("tenant1", tenants["tenant2"])
    logits(session, IDS, "tenant1")
    session.register("tenant1", tenants["tenant2"], replace=True)
    assert np.array_equal(logits(session, IDS, "tenant1"), alone["tenant2"])


def test_a_missing_path_is_refused_immediately_and_a_bad_adapter_by_the_run(
    tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    session = AdapterSession(tiny_llama_bundle)
    with pytest.raises(AdapterError, match="does not exist"):
        session.register("gone", tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    session.register("empty", tmp_path / "empty")
    with pytest.raises(AdapterError, match="adapter_config"):
        logits(session, IDS, "empty")
    logits(session, IDS)  # the session still works


def test_two_names_of_one_adapter_share_its_memory(
    tiny_llama_bundle: Path, tenants: dict[str, Path], tmp_path: Path
) -> None:
    session = AdapterSession(tiny_llama_bundle)
    session.load("one", tenants["tenant1"])
    before = session.statistics.host_bytes
    session.load("other", shutil.copytree(tenants["tenant1"], tmp_path / "copy"))
    assert session.statistics.host_bytes == before
    session.unload("one")
    assert session.statistics.host_bytes == before
    session.unload("other")
    assert session.statistics.host_bytes == 0


# -- budgets -----------------------------------------------------------------------------------


def test_the_least_recently_used_adapters_are_evicted(
    small: Callable[..., AdapterSession], alone: dict[str | None, np.ndarray]
) -> None:
    session = small()
    for _ in range(2):
        for name in alone:
            assert np.array_equal(logits(session, IDS, name), alone[name]), name
            assert session.statistics.host_bytes <= session._bank._memory.budget
    assert session.statistics.evictions > COUNT
    kept = session.statistics
    logits(session, IDS, f"tenant{COUNT - 1}")  # the last one is still in memory
    assert session.statistics.misses == kept.misses
    logits(session, IDS, "tenant0")  # the first one is not
    assert session.statistics.misses == kept.misses + 1


def test_a_pinned_adapter_is_not_evicted(
    small: Callable[..., AdapterSession], alone: dict[str | None, np.ndarray]
) -> None:
    session = small()
    session.pin("tenant0")
    for name in alone:
        logits(session, IDS, name)
    misses = session.statistics.misses
    logits(session, IDS, "tenant0")
    assert session.statistics.misses == misses
    session.unpin("tenant0")
    for name in alone:
        logits(session, IDS, name)
    misses = session.statistics.misses
    logits(session, IDS, "tenant0")
    assert session.statistics.misses == misses + 1
    with pytest.raises(UnknownAdapterError, match="nobody"):
        session.pin("nobody")


def test_an_adapter_that_cannot_be_read_is_not_pinned(
    small: Callable[..., AdapterSession],
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    alone: dict[str | None, np.ndarray],
    tmp_path: Path,
) -> None:
    session, place = small(), tmp_path / "later"
    shutil.copytree(make_adapter(tiny_llama, r=4, seed=90), place)
    session.register("later", place)
    config = (place / "adapter_config.json").read_bytes()
    (place / "adapter_config.json").unlink()
    with pytest.raises(AdapterError):
        session.pin("later")
    (place / "adapter_config.json").write_bytes(config)
    logits(session, IDS, "later")
    for name in alone:
        logits(session, IDS, name)
    misses = session.statistics.misses
    logits(session, IDS, "later")
    assert session.statistics.misses == misses + 1


def test_numpys_weights_blend_like_pythons(small: Callable[..., AdapterSession]) -> None:
    expected = logits(small(), IDS, {"tenant1": 0.5, "tenant2": -2})
    given = {"tenant1": np.float16(0.5), "tenant2": np.int8(-2)}
    assert np.array_equal(logits(small(), IDS, given), expected)  # type: ignore[arg-type]


def test_an_adapter_in_use_is_not_evicted(
    small: Callable[..., AdapterSession], alone: dict[str | None, np.ndarray]
) -> None:
    session = small()
    with session.hold(list(alone)) as held:  # together more than the budget
        assert session.statistics.resident == COUNT
        assert (held.head(0), held.head(1)) == (None, Head())
    assert session.statistics.host_bytes <= session._bank._memory.budget


def test_an_adapter_larger_than_the_budget_is_refused(
    tiny_llama_bundle: Path, tenants: dict[str, Path]
) -> None:
    session = AdapterSession(tiny_llama_bundle, host_budget=1000)
    with pytest.raises(BudgetError, match=r"takes 0\.\d MiB, the whole host_budget is 0\.0 MiB"):
        session.load("big", tenants["tenant3"])
    assert session.adapters == {}
    logits(session, IDS)
    with pytest.raises(UsageError, match="host_budget is 0"):
        AdapterSession(tiny_llama_bundle, host_budget=0)


@pytest.mark.parametrize("layout", ["slots", "rows"])
def test_mixed_batches_of_many_adapters_stay_within_the_budget(
    layout: str,
    small: Callable[..., AdapterSession],
    tiny_llama: Path,
    shared: Path,
    alone: dict[str | None, np.ndarray],
) -> None:
    bundle = exported(tiny_llama, shared, layout)
    session = small(bundle, device_budget=2_000_000)
    choose = random.Random(5)
    for _ in range(40):
        rows = [choose.choice(list(alone)) for _ in range(len(IDS))]
        assert worst(session, IDS, rows, alone) <= tolerance("rows"), rows
        assert session.statistics.device_bytes <= 2_000_000
    assert session.statistics.evictions > 0


def test_a_stack_grows_and_is_then_reused(
    small: Callable[..., AdapterSession], alone: dict[str | None, np.ndarray]
) -> None:
    session = small()
    sizes = set()
    names: list[str | None] = [name for name in alone if name]
    for start in range(COUNT):
        rows = [names[(start + step) % COUNT] for step in range(3)]
        assert worst(session, IDS, rows, alone) <= tolerance("rows")
        sizes.add(session.statistics.device_bytes)
    assert len(sizes) <= 5, "the stack is made anew too often"


def test_threads_share_a_small_bank_without_a_wrong_row(
    small: Callable[..., AdapterSession], alone: dict[str | None, np.ndarray]
) -> None:
    session = small(device_budget=1_000_000)

    def run(seed: int) -> float:
        choose = random.Random(seed)
        rows = [choose.choice(list(alone)) for _ in range(len(IDS))]
        return worst(session, IDS, rows, alone)

    with ThreadPoolExecutor(6) as pool:
        largest = max(pool.map(run, range(150), timeout=PATIENCE))
    assert largest <= tolerance("rows")
    assert session.statistics.host_bytes <= session._bank._memory.budget
    assert session._bank._users == {}


@pytest.mark.slow
def test_sixty_four_adapters_of_every_rank_share_a_batch(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter
) -> None:
    session = AdapterSession(tiny_llama_bundle)
    names = [f"a{rank}" for rank in range(1, 65)]
    for rank, name in enumerate(names, start=1):
        session.load(name, make_adapter(tiny_llama, seed=rank, r=rank, alpha=2 * rank))
    ids = random_ids(64, 4)
    mixed = logits(session, ids, names)
    for row, name in enumerate(names):
        alone = logits(session, ids[row : row + 1], name)[0]
        assert np.abs(mixed[row] - alone).max() <= tolerance("rows"), name


# -- content -----------------------------------------------------------------------------------


def test_an_adapter_that_changed_on_disk_is_not_taken_for_the_old_one(
    small: Callable[..., AdapterSession],
    tenants: dict[str, Path],
    alone: dict[str | None, np.ndarray],
    tmp_path: Path,
) -> None:
    session = small()
    place = Path(shutil.copytree(tenants["tenant1"], tmp_path / "mine"))
    session.load("mine", place)
    shutil.copytree(tenants["tenant2"], place, dirs_exist_ok=True)
    assert np.array_equal(logits(session, IDS, "mine"), alone["tenant1"])  # still in memory
    for name in tenants:
        logits(session, IDS, name)
    with pytest.raises(AdapterError, match="'mine' has changed on disk.*replace=True"):
        logits(session, IDS, "mine")
    session.load("mine", place, replace=True)
    assert np.array_equal(logits(session, IDS, "mine"), alone["tenant2"])


# -- scales and blends -------------------------------------------------------------------------


def test_a_scale_multiplies_an_adapters_update(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter
) -> None:
    session = AdapterSession(tiny_llama_bundle)
    session.load("whole", make_adapter(tiny_llama, r=4, seed=3, alpha=8))
    session.load("half", make_adapter(tiny_llama, r=4, seed=3, alpha=4))
    expected = logits(session, IDS, "half")
    assert np.abs(logits(session, IDS, {"whole": 0.5}) - expected).max() <= tolerance("rows")
    assert np.array_equal(logits(session, IDS, {"whole": 1}), logits(session, IDS, "whole"))
    nothing = logits(session, IDS, {"whole": 0.0})
    assert np.abs(nothing - logits(session, IDS)).max() <= tolerance("rows")


@pytest.mark.parametrize("layout", ["slots", "rows"])
def test_a_blend_is_the_weighted_sum_of_peft(
    layout: str, tiny_llama: Path, shared: Path, make_adapter: MakeAdapter
) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    paths = {"a": make_adapter(tiny_llama, r=4, seed=1), "b": make_adapter(tiny_llama, r=2, seed=2)}
    weights = {"a": 0.7, "b": -0.4}
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapted = peft.PeftModel.from_pretrained(model, paths["a"], adapter_name="a")
    adapted.load_adapter(paths["b"], "b")
    adapted.add_weighted_adapter(["a", "b"], [0.7, 0.4], "sum", combination_type="cat")
    adapted.set_adapter("sum")
    with torch.no_grad():
        plus = adapted(torch.from_numpy(IDS)).logits.numpy()

    bundle = exported(tiny_llama, shared, layout)
    session = AdapterSession(bundle)
    for name, path in paths.items():
        session.load(name, path)
    blended = logits(session, IDS, {"a": 0.7, "b": 0.4})
    assert np.abs(blended - plus).max() <= tolerance("torch-onnx-tiny")
    other = logits(session, IDS, weights)
    assert np.abs(other - blended).max() > 0.01
    mixed = logits(session, IDS, [{"a": 0.7, "b": 0.4}, None, weights])
    for row, expected in enumerate((blended, logits(session, IDS), other)):
        assert np.abs(mixed[row] - expected[row]).max() <= tolerance("rows")


def test_a_blend_is_evicted_with_its_members(
    tiny_llama_bundle: Path, tenants: dict[str, Path], alone: dict[str | None, np.ndarray]
) -> None:
    session = AdapterSession(tiny_llama_bundle)
    for name in ("tenant1", "tenant2"):
        session.load(name, tenants[name])
    first = logits(session, IDS, {"tenant1": 0.5, "tenant2": 0.5})
    assert session.statistics.resident == 3
    session.load("tenant2", tenants["tenant3"], replace=True)
    assert session.statistics.resident == 2
    assert not np.array_equal(logits(session, IDS, {"tenant1": 0.5, "tenant2": 0.5}), first)
    session.unload("tenant1")
    with pytest.raises(UnknownAdapterError, match="tenant1"):
        logits(session, IDS, {"tenant1": 0.5, "tenant2": 0.5})
    assert session.statistics.resident == 1


def test_memory_keeps_only_a_few_blends(tiny_llama_bundle: Path, tenants: dict[str, Path]) -> None:
    session = AdapterSession(tiny_llama_bundle)  # without a budget
    for name in ("tenant1", "tenant2"):
        session.load(name, tenants[name])

    def blended(number: int) -> np.ndarray:
        return logits(session, IDS, {"tenant1": 0.5 + number / 50, "tenant2": 0.5})

    first = blended(0)
    with session.hold({"tenant1": 3.0, "tenant2": 0.5}):
        kept = [session.statistics.resident for number in range(1, 13) if blended(number).size]
        assert max(kept) <= 2 + 1 + 8  # the members, the blend in use, some others
        assert kept[0] == 5
    assert session.statistics.resident <= 2 + 8
    misses = session.statistics.misses
    assert np.array_equal(blended(0), first)  # computed again from members in memory
    assert session.statistics.misses == misses
    many = [{"tenant1": number / 7, "tenant2": 0.5} for number in range(1, 13)]
    rows = logits(session, random_ids(len(many), 5), many)  # all in use at the same time
    assert len({row.tobytes() for row in rows}) == len(many)
    assert session.statistics.resident <= 2 + 8


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "names no adapter"),
        ({"tenant1": float("nan")}, "give a finite number"),
        ({"tenant1": True}, "give a finite number"),
        ({"tenant1": "0.5"}, "give a finite number"),
        ({"tenant1": np.float16("inf")}, "give a finite number"),
        ({"tenant1": 10**400}, "give a finite number"),
    ],
)
def test_an_invalid_blend_is_refused(
    spec: dict[str, float], message: str, small: Callable[..., AdapterSession]
) -> None:
    with pytest.raises(UsageError, match=message):
        logits(small(), IDS, spec)


def test_a_scale_is_refused_for_adapters_with_heads(
    tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    task = "sequence-classification"
    adapter = make_adapter(tiny_bert, seed=1, task=task, modules_to_save=["classifier"])
    export(tiny_bert, tmp_path / "bundle", adapters={"mine": adapter}, task=task)
    session = AdapterSession(tmp_path / "bundle")
    with pytest.raises(UsageError, match=r"with classifier\.\w+ .*cannot be blended"):
        logits(session, IDS, {"mine": 0.5})
    logits(session, IDS, "mine")
