"""The serving benchmark on a tiny model: its figures and its chart."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tools.bench_serve.__main__ import main
from tools.bench_serve.costs import StepCost
from tools.bench_serve.latency import Arrival, arrivals, offer
from tools.bench_serve.report import markdown, summary
from tools.bench_serve.sides import RunReport

REGISTERED = 40  # more adapters than fit in memory


def test_requests_arrive_at_their_rate_and_latency_counts_from_the_planned_arrival() -> None:
    found = arrivals([[1]] * 400, ["a"] * 400, 100.0, 0)
    assert found[0].at == 0.0
    assert found[-1].at == pytest.approx(4.0, rel=0.2)
    assert {one.at for one in arrivals([[1]] * 3, ["a"] * 3, None, 0)} == {0.0}
    sent: list[int] = []

    async def ask(prompt: list[int], adapter: str) -> AsyncIterator[str]:
        sent.append(prompt[0])
        for piece in "abc":
            await asyncio.sleep(0.01)
            yield piece

    late = asyncio.run(offer(ask, [Arrival(0.05, [2], "a"), Arrival(0.0, [1], "b")]))
    assert sent == [1, 2]
    assert len(late.first) == 2
    assert len(late.between) == 4
    assert min(*late.first, *late.between) >= 0.009
    assert late.seconds >= 0.079


def test_a_step_is_its_run_and_the_rest() -> None:
    assert StepCost(graph=9.0, rest=1.0).share == pytest.approx(0.1)


def run_tool(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_serve", *map(str, flags)])
    main()


def test_latency_against_load_is_measured_and_drawn(
    tiny_llama_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tool(
        monkeypatch,
        "--bundle",
        f"tiny={tiny_llama_bundle}",
        "--output",
        tmp_path,
        "--load",
        0.2,
        0.6,
        "--seconds",
        1,
        "--clients",
        4,
        "--tokens",
        8,
        "--registered",
        REGISTERED,
    )
    report = json.loads((tmp_path / "load-tiny.json").read_text())
    few, many = report["curves"].values()
    assert [point["rate"] for point in few] == pytest.approx(
        [0.2 * report["capacity"], 0.6 * report["capacity"]]
    )
    for point in (*few, *many):
        assert 0 <= point["adapters_read"] <= point["requests"]
        assert 0 < point["first_token_ms"][0] <= point["first_token_ms"][1]
        assert 0 < point["inter_token_ms"][0] <= point["inter_token_ms"][1]
    assert sum(point["adapters_read"] for point in few) == 0  # all are in memory
    drawn = (tmp_path / "load-tiny.svg").read_bytes()
    assert b"<svg" in drawn
    (tmp_path / "load-tiny.svg").unlink()
    run_tool(monkeypatch, "--draw", tmp_path / "load-tiny.json")
    assert (tmp_path / "load-tiny.svg").read_bytes() == drawn


def test_the_cost_of_a_step_is_measured_in_the_engine_and_over_http(
    tiny_llama_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tool(
        monkeypatch,
        "--bundle",
        f"tiny={tiny_llama_bundle}",
        "--output",
        tmp_path,
        "--costs",
        1,
        3,
        "--rounds",
        2,
        "--tokens",
        8,
    )
    costs = json.loads((tmp_path / "costs-tiny.json").read_text())["costs"]
    assert [(row["rows"], row["side"]) for row in costs] == [
        (rows, side) for rows in (1, 3) for side in ("engine", "http")
    ]
    for row in costs:
        assert row["graph_ms"] > 0
        assert 0 < row["share"]["median"] < 1


def runs_of(speed: float, text: str, **times: list[float]) -> list[RunReport]:
    return [RunReport(speed=speed, economy=speed / 2, texts=[text], **times) for _ in range(3)]


def test_an_engine_without_streaming_is_compared_by_tokens_per_second() -> None:
    timed = {"first": [0.1], "between": [0.01]}
    runs = {side: runs_of(60.0, "a", **timed) for side in ("engine", "control")}
    found = summary("fp32", runs | {"llama.cpp": runs_of(20.0, "b")}, 0.0)
    (row,) = found["ratios"]
    assert (row["over"], row["ratio"]["median"], row["met"]) == (
        "llama.cpp",
        pytest.approx(3),
        True,
    )
    assert found["same_texts"] == {"control": 1.0, "llama.cpp": 0.0}
    assert not found["not_concluded"]  # another engine rounds differently
    assert json.loads(json.dumps(found, allow_nan=False))["sides"]["llama.cpp"] == {
        "tokens_per_second": 20.0,
        "tokens_per_processor_second": 10.0,
        "first_token_ms": None,
        "inter_token_ms": None,
        "outside_of_the_graph": None,
    }
    assert "| fp32 | llama.cpp | 20.0 | 10.0 | – | – | – |" in markdown([found])


def test_there_is_no_conclusion_if_the_server_gives_other_texts() -> None:
    runs = {side: runs_of(60.0, "a") for side in ("engine", "control")}
    found = summary("fp32", runs | {"http": runs_of(60.0, "b")}, 0.0)
    assert found["not_concluded"] == ["http gives other texts than the engine"]
    assert [row["met"] for row in found["ratios"]] == [None]
