"""Parity of recorded and replayed runs: what the certificate covers, and that wrong replays fail.

The CPU provider cannot record runs. The fixture `recording` changes its row in the provider table,
so that its runs take the code path of recorded ones (tests/runtime/test_capture.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loradeploy.bundle.proof.provider import ProviderFacts
from loradeploy.errors import BundleError, UsageError
from loradeploy.parity.report.results import ParityReport
from loradeploy.parity.variants import choose_variants
from loradeploy.runtime.capture import replays
from loradeploy.runtime.devices import table
from loradeploy.runtime.session import AdapterSession
from tests.inputs.edits import edited_json
from tests.parity.conftest import Check

CAPTURED = "cpu captured"


@pytest.fixture
def bundle(llama_in_form: Callable[..., Path]) -> Path:
    """A decoder bundle with a cache of fixed size and an adapter, not yet certified."""
    return llama_in_form("in-place", attention="gqa", layout="rows")


@pytest.fixture
def quick(check: Check) -> Check:
    def run(bundle: Path, **options: Any) -> ParityReport:
        few = {"backends": ["onnx-side-inputs", "onnx-mixed"], "phases": ["prefill", "decode"]}
        return check(bundle, prompts=["The news", "Hi"], capture_graphs=True, **few, **options)

    return run


def test_both_ways_to_run_are_compared_and_certified(
    bundle: Path, quick: Check, recording: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    made = replays._options
    monkeypatch.setattr(replays, "_options", lambda n: numbers.append(n) or made(n))
    report = quick(bundle, certificate=True)
    assert report.passed, report.failures
    assert {r.variant.provider for r in report.results if r.variant} == {"cpu", CAPTURED}
    decoded = [r for r in report.results if r.variant and r.variant.provider == CAPTURED]
    assert {(r.backend, r.phase) for r in decoded} >= {("onnx-side-inputs", "decode")}
    # Runs of the base and of the adapter were recorded and replayed.
    assert set(numbers) == {-1, 1, 2} and min(numbers.count(1), numbers.count(2)) > 2
    reported = {r.phase: r.message for r in decoded if r.adapter == "one"}
    # The decode phase begins with the prompts, whose runs are not recorded.
    assert re.fullmatch(r"[1-9]\d* of [1-9]\d* runs were replays", reported["decode"] or ""), (
        reported
    )
    assert re.fullmatch(r"0 of [1-9]\d* runs were replays", reported["prefill"] or ""), reported
    facts = {own.provider: own for own in report.environment.providers}
    assert facts[CAPTURED].captured and not facts["cpu"].captured
    for capture in (False, True):
        session = AdapterSession(bundle, ["cpu"], capture_graphs=capture, require_certificate=True)
        assert session.provider.captured is capture
    # A certificate of only recorded runs, like one of only ordinary runs, covers only those.
    written = bundle / "parity.json"
    with edited_json(written) as values:
        values["results"] = [r for r in values["results"] if r["variant"]["provider"] == CAPTURED]
    with pytest.raises(BundleError, match="not certified for cpu .* its runs are not captured"):
        AdapterSession(bundle, ["cpu"], require_certificate=True)


@pytest.mark.parametrize("limit", ["prompts alone", "no recording left"])
def test_a_check_in_which_no_run_was_replayed_does_not_certify_captured_runs(
    bundle: Path, check: Check, recording: None, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    phases = ["prefill"] if limit == "prompts alone" else ["prefill", "decode"]
    if limit == "no recording left":  # except the one for the base
        monkeypatch.setattr(replays, "MOST_RECORDINGS", 1)
    report = check(
        bundle,
        prompts=["The news"],
        capture_graphs=True,
        backends=["onnx-side-inputs"],
        phases=phases,
        certificate=True,
    )
    assert report.passed, report.failures
    found = [r for r in report.results if r.variant and r.variant.provider == CAPTURED]
    not_run = [r.message or "" for r in found if r.outcome == "not run"]
    assert re.fullmatch(
        r"none of the \d+ runs of one on cpu captured, all was captured", not_run[-1]
    )
    assert len(not_run) == (2 if limit == "prompts alone" else 1)
    assert not any(r.adapter == "one" for r in found)
    AdapterSession(bundle, ["cpu"], require_certificate=True)
    with pytest.raises(BundleError, match="not certified for cpu .*captured runs"):
        AdapterSession(bundle, ["cpu"], capture_graphs=True, require_certificate=True)


def test_a_certificate_of_ordinary_runs_does_not_cover_captured_runs(
    certified_bundle: Path, recording: None
) -> None:
    message = (
        "not certified for cpu .*captured runs.*: it was checked on cpu .*, and its runs are"
        " captured; run `loradeploy parity .* --provider cpu --capture-graphs`"
    )
    with pytest.raises(BundleError, match=message):
        AdapterSession(certified_bundle, ["cpu"], capture_graphs=True, require_certificate=True)


def test_a_replay_with_the_previous_inputs_fails_the_check(
    bundle: Path, quick: Check, recording: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = replays.Replays._recorded
    first: dict[Any, Any] = {}

    def stale(self: Any, key: Any, recording: Any, feeds: Any, ids: Any) -> Any:
        kept = first.setdefault(key, {n: feeds[n] for n in recording.feeds})
        return recorded(self, key, recording, {**feeds, **kept}, ids)

    monkeypatch.setattr(replays.Replays, "_recorded", stale)
    report = quick(bundle, localize=False)
    failed = {
        (r.variant.provider, r.phase) for r in report.results if r.variant and r.outcome == "failed"
    }
    assert failed == {(CAPTURED, "decode")}


def test_capture_is_refused_where_no_provider_can_record() -> None:
    message = "CPUExecutionProvider captures no runs here: give one of cuda, webgpu"
    with pytest.raises(UsageError, match=message):
        choose_variants(["cpu"], None, capture_graphs=True)


def test_captured_runs_are_a_variant_of_their_provider() -> None:
    usual = ProviderFacts("cpu", (table.CPU,))
    captured = dataclasses.replace(usual, provider=CAPTURED, captured=True)
    assert usual.difference(captured) == "its runs are captured"
    assert captured.difference(usual) == "its runs are not captured"
    assert captured.name == "cpu" and captured.is_named("cpu")
    assert "captured runs" in str(captured)
