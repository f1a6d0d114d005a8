"""The benchmark against other engines draws no conclusions from unequal work."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from tools.bench_peers.__main__ import CONTROL, CONTROLLED, GOALS, summary
from tools.bench_peers.agreement import NEAR, Parting, partings
from tools.bench_peers.llama_files import _interleaved
from tools.bench_peers.report import markdown
from tools.timing.alternate import BUSY, NOISE

SIDES = ("slots", "rows", "in place", "operators", "OpenVINO GenAI", "llama.cpp", CONTROL)
ROUNDS = 4
QUIET = [0.0] * ROUNDS


def far(parting: Parting) -> float:
    """Logits that differ by more than rounding."""
    return 10 * NEAR


def run(seconds: float, tokens: list[int]) -> dict[str, Any]:
    """Return a side's report of a round in which everything took `seconds`."""
    times = dict.fromkeys([*GOALS, "alternating", "kept"], seconds)
    del times["resident"]
    return {
        "seconds": {**times, "alternating": seconds + 0.008},
        "tokens": {"128 base": [tokens]},
        "load": 0.03,
        "resident": 700.0,
        "peak": 900.0,
    }


@pytest.fixture
def runs() -> dict[str, list[dict[str, Any]]]:
    """Reports of other engines that take twice the time of loradeploy for the same tokens."""
    peers = ("OpenVINO GenAI", "llama.cpp")
    return {
        side: [run(0.2 if side in peers else 0.1, [1, 2, 3]) for _ in range(ROUNDS)]
        for side in SIDES
    }


def test_ratios_are_loradeploys_over_the_others(runs: dict[str, Any]) -> None:
    found = summary("fp32", runs, QUIET, far)
    assert not found["not_concluded"]
    ratios = {(row["what"], row["ours"], row["peer"]): row["median"] for row in found["ratios"]}
    assert ratios["eight", "rows", "llama.cpp"] == pytest.approx(0.5)
    assert ratios["resident", "slots", "OpenVINO GenAI"] == 1
    assert found["swap_ms"]["rows"] == pytest.approx(1.0)
    shown = markdown({"results": [found]})
    assert (
        "| eight | rows / llama.cpp | 0.50 (0.50–0.50) | 1.00 (1.00–1.00) | ≤ 0.4 | no |" in shown
    )
    assert "| step 128 one | rows / llama.cpp | 0.50 (0.50–0.50) |" in shown
    assert "concluded" not in shown


@pytest.mark.parametrize("side", ["rows", "llama.cpp"])
def test_different_tokens_are_not_comparable(runs: dict[str, Any], side: str) -> None:
    runs[side][-1] = run(0.1, [1, 2, 4])
    found = summary("fp32", runs, QUIET, far)
    assert found["not_concluded"] == [f"other tokens from {side}: not the same work"]
    assert found["same_tokens"][side] == pytest.approx(2 / 3)
    shown = markdown({"results": [found]})
    assert "yes |" not in shown
    assert "not concluded" in shown


def test_tokens_that_differ_by_rounding_are_comparable(runs: dict[str, Any]) -> None:
    runs["llama.cpp"][-1] = run(0.1, [1, 5, 4])
    (parting,) = partings(*(runs[side][-1]["tokens"] for side in ("llama.cpp", "slots")))
    assert parting == Parting("128 base", 0, [1], 5, 2)
    found = summary("fp32", runs, QUIET, lambda at: NEAR / 2 if at == parting else NEAR * 2)
    assert not found["not_concluded"]
    assert "llama.cpp's differ first, the two tokens' logits differ by at most 0.0050." in (
        markdown({"results": [found]})
    )


def test_quantized_models_can_differ_and_the_share_is_shown(runs: dict[str, Any]) -> None:
    runs["llama.cpp"][-1] = run(0.1, [1, 2, 4])
    found = summary("int4", runs, QUIET, far)
    assert not found["not_concluded"]
    assert "llama.cpp 67%" in markdown({"results": [found]})


def test_a_figure_with_an_unstable_control_has_no_conclusion(runs: dict[str, Any]) -> None:
    slow = copy.deepcopy(runs[CONTROLLED])
    for one in slow:
        one["seconds"]["eight"] *= 1 + 2 * NOISE
    found = summary("fp32", {**runs, CONTROL: slow}, QUIET, far)
    assert {row["what"] for row in found["ratios"] if not row["concluded"]} == {"eight"}
    shown = markdown({"results": [found]})
    assert "| 1.20 (1.20–1.20) | ≤ 0.4 | not concluded |" in shown
    assert (
        "| step 128 one | rows / llama.cpp | 0.50 (0.50–0.50) | 1.00 (1.00–1.00) | ≤ 0.9 | yes |"
        in shown
    )


@pytest.mark.parametrize("work", [[0.0, 2 * BUSY], [0.0, None]])
def test_a_busy_machine_gives_no_conclusions(
    runs: dict[str, Any], work: list[float | None]
) -> None:
    (problem,) = summary("fp32", runs, work, far)["not_concluded"]
    assert problem.startswith("the machine has other work")


def test_rows_of_queries_have_the_order_of_llama_cpp() -> None:
    # In a head of 4, transformers rotates 0 with 2 and 1 with 3, llama.cpp 0 with 1 and 2 with 3.
    rows = np.arange(8)[:, None]
    assert _interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
