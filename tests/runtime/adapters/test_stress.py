"""Stress: with eight threads and budgets far below the need, every row has its own adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import once
from tests.tolerances import tolerance
from tools.stress import LAYOUTS, Stress, write_adapters


@pytest.fixture(scope="module")
def seconds(request: pytest.FixtureRequest) -> float:
    """The duration of the stress for each of the three layouts: longer with --all."""
    return 20.0 if request.config.getoption("--all") else 2.5


@pytest.fixture
def stress(
    tiny_llama: Path, shared: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Stress:
    from loradeploy.export.api import export

    options = LAYOUTS[request.param]
    bundle = once(
        shared / f"stress-{request.param}", lambda place: export(tiny_llama, place, **options)
    )
    return Stress(bundle, write_adapters(bundle, tmp_path), tolerance("rows"))


@pytest.mark.parametrize("stress", LAYOUTS, indirect=True)
def test_every_row_has_its_adapter_under_constant_eviction(stress: Stress, seconds: float) -> None:
    assert stress.apart() > 1000 * stress.tolerance  # a row with another adapter would be detected
    counts = stress.run(seconds, threads=8)
    assert counts.raised == [] and counts.wrong == [], counts
    assert counts.rows > 0 and counts.evictions > 0, counts


@pytest.mark.parametrize("stress", ["rows"], indirect=True)
def test_a_wrong_row_and_an_error_are_detected(
    stress: Stress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: exchanged expected rows of two adapters, and unloaded names."""
    stress.expected[1], stress.expected[2] = stress.expected[2], stress.expected[1]
    inputs = [0, 1]
    rows = [stress.specs[1], None]
    stress._compare(inputs, [1, 0], stress._run(stress.session, inputs, rows))
    assert len(stress.counts.wrong) == 1 and stress.counts.wrong[0].startswith("row 0 of")
    for name in stress.session.adapters:
        stress.session.unload(name)
    counts = stress.run(1, threads=2)
    assert counts.raised and counts.raised[0].startswith("UnknownAdapterError: no adapter")
