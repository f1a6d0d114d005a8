"""Parity of sessions with the operators' library, and what its certificate covers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loradeploy as ld
from loradeploy.bundle.names import ADAPTER_RANKS
from loradeploy.errors import BundleError, OperatorError, UsageError
from loradeploy.parity.report.results import ParityReport
from loradeploy.runtime.adapters.filling import Filler
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter
from tests.parity.conftest import Check

WITH_LIBRARY = "cpu operator"


@pytest.fixture
def bundle(llama_in_form: Callable[..., Path]) -> Path:
    """A bundle whose updates are calls, with an adapter, not yet certified."""
    return llama_in_form("operator", operator=True)


@pytest.fixture
def quick(check: Check, operator_library: Path) -> Check:
    def run(bundle: Path, **options: Any) -> ParityReport:
        few = {"phases": ["prefill", "padded batch", "decode"], "prompts": ["The news", "Hi"]}
        return check(bundle, **{"operator": operator_library, **few, **options})

    return run


def failing(report: ParityReport) -> set[tuple[str, str]]:
    return {
        (result.backend, "" if result.variant is None else result.variant.provider)
        for result in report.results
        if result.outcome == "failed"
    }


def test_the_function_and_the_library_are_compared_and_certified(
    bundle: Path, quick: Check, operator_library: Path
) -> None:
    report = quick(bundle, certificate=True, controls=True)
    assert report.passed, report.failures
    both = {"onnx-side-inputs", "onnx-mixed"}
    ran = {r.backend for r in report.results if r.variant and r.variant.provider == WITH_LIBRARY}
    assert ran == both
    ran = {r.backend for r in report.results if r.variant and r.variant.provider == "cpu"}
    assert ran >= {*both, "onnx-native", "onnx-merged"}
    facts = {own.provider: own for own in report.environment.providers}
    assert facts[WITH_LIBRARY].operator and not facts["cpu"].operator
    for library in (None, operator_library):
        AdapterSession(bundle, operator=library, require_certificate=True).close()


def test_a_certificate_without_the_library_does_not_cover_it(
    bundle: Path, quick: Check, operator_library: Path
) -> None:
    assert quick(bundle, operator=None, certificate=True).passed
    AdapterSession(bundle, require_certificate=True).close()
    with pytest.raises(
        BundleError, match=r"runs with the operators' library; run .* --operator FILE"
    ):
        AdapterSession(bundle, operator=operator_library, require_certificate=True)


def test_wrong_ranks_fail_in_mixed_batches_with_the_library_only(
    bundle: Path, quick: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Filler.write

    def wrong(self: Filler, arrays: Any, slot: int, resident: Any) -> None:
        write(self, arrays, slot, resident)
        if ADAPTER_RANKS in arrays:
            arrays[ADAPTER_RANKS][slot] //= 2

    monkeypatch.setattr(Filler, "write", wrong)
    report = quick(bundle)
    assert failing(report) == {("onnx-mixed", WITH_LIBRARY)}
    assert not report.passed


def test_a_merged_bundle_is_compared_with_the_library_and_a_wrong_adapter_fails_in_both(
    llama_with_adapter: Path,
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    quick: Check,
    tmp_path: Path,
) -> None:
    one = llama_with_adapter / "adapters" / "one"
    form = {"merge": True, "operator": True, "attention": "gqa"}
    ld.export(llama_with_adapter, tmp_path / "merged", adapters={"one": one}, **form)
    few = {"phases": ["prefill", "decode"], "backends": ["onnx-merged"]}
    report = quick(tmp_path / "merged", adapters={"one": one}, **few)
    assert report.passed, report.failures
    ran = {result.variant.provider for result in report.results if result.variant}
    assert ran == {"cpu", WITH_LIBRARY}
    other = make_adapter(tiny_llama, seed=9, scale=0.1)
    ld.export(llama_with_adapter, tmp_path / "other", adapters={"one": other}, **form)
    wrong = quick(tmp_path / "other", adapters={"one": one}, certificate=False, **few)
    assert failing(wrong) == {("onnx-merged", "cpu"), ("onnx-merged", WITH_LIBRARY)}


def test_differences_inside_the_graph_are_searched_in_standard_operators(
    bundle: Path, quick: Check
) -> None:
    report = quick(bundle, localize=True, backends=["onnx-side-inputs"])
    assert report.passed, report.failures
    assert report.localizations


def test_a_bundle_without_calls_is_refused(llama_bundle: Path, quick: Check) -> None:
    with pytest.raises(UsageError, match="has no calls of operators: export it again"):
        quick(llama_bundle)


def test_a_file_that_is_no_library_is_refused(bundle: Path, quick: Check, tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="does not exist"):
        quick(bundle, operator=tmp_path / "lora_add.so")
