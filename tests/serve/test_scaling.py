"""The capacity simulation: known results, plausibility, and the figures in the documentation."""

from __future__ import annotations

import dataclasses
import io
import re
import shlex
import sys
from contextlib import redirect_stdout

import pytest

from tests.conftest import ROOT
from tools.simulate_serving.__main__ import main, read_figures
from tools.simulate_serving.model import (
    ROUTINGS,
    Cluster,
    Figures,
    Load,
    hashed,
    planned,
    quantile,
    simulate,
)

FIGURES = Figures(
    step={1: 0.01, 4: 0.02, 8: 0.03},
    mixed=1.5,
    prefill=(0.05, 0.001),
    request=0.002,
    load=(0.1, 1e-6),
    rank_bytes=1000.0,
    start=20.0,
)
ALONE = Load(adapters=1, ranks=(8,), prompt=50, output=21, spread=False, clients=1, requests=10)
BUSY = Load(adapters=50, rate=8.0, requests=600, prompt=20, output=20)


def test_one_client_of_one_node_is_the_sum_of_its_parts() -> None:
    found = simulate(ALONE, Cluster(nodes=1), FIGURES)
    prefill, decode = 0.05 + 0.001 * 50, 20 * 0.01
    assert found.whole[5] == pytest.approx(prefill + decode + 0.002)
    assert found.whole[0] == pytest.approx(found.whole[5] + 0.1 + 1e-6 * 8000)  # plus a load
    assert found.first[5] == pytest.approx(prefill + 0.002)
    assert found.between[5] == pytest.approx(0.01)
    assert (found.loads, found.hits, found.tokens) == (1, 9, 210)
    seconds = 10 * (prefill + decode) + 9 * 0.002 + 0.108
    assert found.rate == pytest.approx(210 / seconds)
    hour = found.rate * 3600
    assert found.cost(Cluster(nodes=1, price=3.0)) == pytest.approx(3.0 / hour * 1e6)


@pytest.mark.parametrize(
    ("rows", "adapters", "seconds"),
    [(1, 1, 0.01), (4, 1, 0.02), (6, 1, 0.025), (16, 1, 0.06), (6, 3, 0.0375)],
)
def test_a_step_is_interpolated(rows: int, adapters: int, seconds: float) -> None:
    assert FIGURES.step_time(rows, adapters) == pytest.approx(seconds)


def test_a_request_waits_for_an_adapter_that_is_being_read() -> None:
    slow = dataclasses.replace(FIGURES, load=(2.0, 0.0), request=0.0)
    load = Load(adapters=1, rate=100, requests=20, prompt=1, output=2, spread=False)
    found = simulate(load, Cluster(nodes=1), slow)
    assert (found.loads, found.hits) == (1, 19)
    assert min(found.first) > 1.5, "all of them came within a fraction of a second"


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_request_is_served_and_more_nodes_wait_less(routing: str) -> None:
    few = simulate(BUSY, Cluster(nodes=1, routing=routing), FIGURES)
    many = simulate(BUSY, Cluster(nodes=4, routing=routing), FIGURES)
    for found in (few, many):
        assert len(found.whole) == len(found.first) == found.hits + found.loads == 600
        assert 0 < found.busy <= 1
    assert quantile(many.first, 0.9) < quantile(few.first, 0.9)
    assert simulate(BUSY, Cluster(nodes=4, routing=routing), FIGURES) == many  # deterministic
    other = dataclasses.replace(BUSY, seed=1)
    assert simulate(other, Cluster(nodes=4, routing=routing), FIGURES) != many


def test_adapters_with_node_affinity_are_loaded_less_often() -> None:
    found = {
        routing: simulate(BUSY, Cluster(nodes=4, routing=routing, memory=4e5), FIGURES)
        for routing in ROUTINGS
    }
    assert found["sticky"].loads < 0.8 * found["least"].loads
    assert found["planned"].loads < 0.8 * found["least"].loads
    small = simulate(BUSY, Cluster(nodes=4, routing="sticky", memory=5e4), FIGURES)
    assert small.loads > found["sticky"].loads


def test_a_plan_spreads_the_work_within_the_memory() -> None:
    load = Load(adapters=40, zipf=1.2, ranks=(8, 64))
    total = sum(load.rank(adapter) for adapter in range(40)) * FIGURES.rank_bytes
    cluster = Cluster(nodes=4, memory=0.4 * total)
    homes = planned(load, cluster, FIGURES)
    assert len(homes[0]) > len(homes[-1]) == 1  # the most popular adapter is on several nodes
    work, held = [0.0] * 4, [0.0] * 4
    for adapter, nodes in enumerate(homes):
        for node in nodes:
            work[node] += load.popularity[adapter] / len(nodes)
            held[node] += load.rank(adapter) * FIGURES.rank_bytes
    assert max(work) < 1.3 * min(work)
    assert max(held) <= cluster.memory
    by_hash = [0.0] * 4
    for adapter, share in enumerate(load.popularity):
        by_hash[hashed(adapter, 4)] += share
    assert max(by_hash) > max(work)
    moved = sum(hashed(adapter, 4) != hashed(adapter, 5) for adapter in range(1000))
    assert moved < 300  # a new node takes over only its share


def test_the_first_requests_wait_for_nodes_to_start() -> None:
    warm = simulate(BUSY, Cluster(nodes=4), FIGURES)
    cold = simulate(BUSY, Cluster(nodes=4, cold=3), FIGURES)
    assert quantile(cold.first, 0.99) > quantile(warm.first, 0.99)
    assert len(cold.whole) == 600


@pytest.mark.parametrize("option", ["--routing least sticky", "--cold"])
def test_the_page_shows_what_a_command_prints(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    monkeypatch.chdir(ROOT)
    line = next(row for row in page.splitlines() if row.startswith("$") and option in row)
    words = shlex.split(line.removeprefix("$ python -m "))
    assert words[0] == "tools.simulate_serving"
    monkeypatch.setattr(sys, "argv", words)
    printed = io.StringIO()
    with redirect_stdout(printed):
        main()
    head, *rows = printed.getvalue().splitlines()
    below = page.partition(line)[2]
    shown = [row.strip("| ") for row in re.findall(r"^\| .*", below, re.MULTILINE)]
    assert [head, *rows] == shown[: len(rows) + 1]
    assert {field.name for field in dataclasses.fields(read_figures("docs/scaling.json"))} == set(
        re.findall(
            r"^\| `(\w+)` \|", page.partition("## Figures")[2].partition("##")[0], re.MULTILINE
        )
    )
