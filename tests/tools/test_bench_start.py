"""The benchmark of the start measures whole processes, and fails if one of them does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.bench_start import Process, measure, processes, table


def test_every_process_of_a_bundle_is_measured(tiny_llama_bundle: Path, tmp_path: Path) -> None:
    sides = processes(tiny_llama_bundle, None, [], tmp_path)
    heading, rule, *rows = measure(sides, rounds=2).splitlines()
    assert heading.count("|") == rule.count("|") == 5
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(sides)
    assert all(len(side.peaks) == 2 for side in sides.values())


def test_the_processor_time_of_a_process_is_measured(tmp_path: Path) -> None:
    busy, idle = (
        Process([sys.executable, "-c", f"import time; {work}"], Path.cwd(), tmp_path)
        for work in ("\nwhile time.process_time() < 0.5: pass", "time.sleep(0.5)")
    )
    assert idle.time(1)[0] < 0.4 < busy.time(1)[0]


def test_a_process_that_fails_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="failed: 3"):
        Process([sys.executable, "-c", "raise SystemExit(3)"], Path.cwd(), tmp_path).time(1)


def test_a_table_has_medians_and_all_values() -> None:
    assert table({"a": ([3.0, 1.0, 2.0], [7.0, 9.0, 8.0])}).splitlines()[2] == (
        "| a | 2.00 | 1.00–3.00 | 8 |"
    )
