"""Shrinking a failing input to a minimal counterexample, without affecting the verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.parity import job
from loradeploy.parity.diagnose.shrink import MOST, TRIES, Fault, shrink
from loradeploy.parity.inputs.tokens import make_cases
from loradeploy.parity.report.results import Counterexample
from loradeploy.runtime.session import AdapterSession
from tests.parity.conftest import PROMPTS, Check
from tests.parity.tampering import change_embedding, change_graph, see_the_future_in_chunks

Tokens = tuple[int, ...]


def holding(*needed: int) -> Callable[[Tokens], Fault | None]:
    """Return a predicate that fails where all of `needed` are among the tokens."""
    return lambda tokens: Fault("x", 1.0) if set(needed) <= set(tokens) else None


# -- the search --------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("at", [0, 1, 100, 198, 199])
def test_a_single_failing_token_is_found_at_any_position(at: int, causal: bool) -> None:
    found = shrink(tuple(range(200)), holding(at), causal=causal)
    assert found is not None
    assert found[0] == (at,)
    assert found[2] <= TRIES


def test_tokens_that_do_not_fail_are_not_shrunk() -> None:
    assert shrink((1, 2, 3), holding(9), causal=True) is None
    assert shrink((), holding(), causal=True) is None


@given(
    tokens=st.lists(st.integers(0, 5), min_size=1, max_size=40).map(tuple),
    needed=st.sets(st.integers(0, 5), min_size=1, max_size=3),
    causal=st.booleans(),
    tries=st.integers(1, 60),
)
@settings(deadline=None)
def test_the_result_fails_and_the_number_of_tries_is_limited(
    tokens: Tokens, needed: set[int], causal: bool, tries: int
) -> None:
    calls: list[Tokens] = []

    def fails(candidate: Tokens) -> Fault | None:
        calls.append(candidate)
        return holding(*needed)(candidate)

    found = shrink(tokens, fails, causal=causal, tries=tries)
    if holding(*needed)(tokens) is None:
        assert found is None
        return
    assert found is not None
    smallest, _, tried = found
    assert holding(*needed)(smallest)
    assert smallest in calls
    assert tried == len(calls) <= tries


@given(needed=st.sets(st.integers(0, 30), min_size=1, max_size=4), causal=st.booleans())
@settings(deadline=None)
def test_with_enough_tries_no_token_of_the_result_can_be_removed(
    needed: set[int], causal: bool
) -> None:
    found = shrink(tuple(range(31)), holding(*needed), causal=causal, tries=1000)
    assert found is not None
    assert set(found[0]) == needed


# -- in a check --------------------------------------------------------------------------------


@pytest.fixture
def rare(llama_with_adapter: Path) -> int:
    """A token that occurs in the random rows and in no prompt."""
    cases = make_cases(
        llama_with_adapter,
        read_manifest(llama_with_adapter),
        prompts=PROMPTS,
        generated=1,
        seed=0,
        fuzz=8,
    )
    prompts = {token for row in cases.prompts[: len(PROMPTS)] for token in row}
    return next(t for row in cases.prompts[len(PROMPTS) : -2] for t in row if t not in prompts)


def test_one_wrong_embedding_is_found_by_fuzz_and_shrinks_to_its_token(
    llama_bundle: Path, rare: int, check: Check
) -> None:
    change_embedding(llama_bundle, rare)
    only = {"backends": ["onnx-side-inputs"], "tokens": 1, "shrink": True}
    failed = [r for r in check(llama_bundle, **only).results if r.outcome == "failed"]
    assert [result.aspect for result in failed] == ["weights"], "no prompt has the token"
    report = check(llama_bundle, **only, fuzz=8)
    assert not report.passed
    assert {(e.adapter, e.tokens) for e in report.counterexamples} == {
        (None, (rare,)),
        ("one", (rare,)),
    }
    example = report.counterexamples[0]
    assert example.text == Tokenizer(llama_bundle).decode([rare])
    assert example.error > 0.01
    assert example.message.startswith("prefill: max abs")
    assert example.length > len(example.tokens)


def test_a_check_that_passes_has_no_counterexample(llama_with_adapter: Path, check: Check) -> None:
    report = check(llama_with_adapter, backends=["onnx-side-inputs"], shrink=True)
    assert report.passed
    assert report.counterexamples == ()


def test_a_failure_in_chunked_prefill_shrinks_to_the_fewest_tokens_that_make_two_chunks(
    llama_bundle: Path, check: Check
) -> None:
    change_graph(llama_bundle, see_the_future_in_chunks)
    report = check(llama_bundle, backends=["onnx-side-inputs"], shrink=True)
    assert [len(example.tokens) for example in report.counterexamples] == [4, 4]
    assert all(e.message.startswith("chunked prefill: ") for e in report.counterexamples)


def test_a_row_with_its_neighbors_adapter_shrinks_beside_another_row(
    llama_with_adapter: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = AdapterSession.run_with_ort_values

    def off_by_one(self: Any, outputs: Any, feeds: Any, adapters: Any, **buffers: Any) -> Any:
        return right(self, outputs, feeds, [*adapters[1:], adapters[0]], **buffers)

    monkeypatch.setattr(AdapterSession, "run_with_ort_values", off_by_one)
    report = check(llama_with_adapter, backends=["onnx-mixed"], shrink=True)
    by_adapter: dict[str | None, Counterexample] = {e.adapter: e for e in report.counterexamples}
    assert set(by_adapter) == {None, "one"}
    assert len(by_adapter["one"].tokens) == 1
    assert by_adapter["one"].message.startswith("padded batch, beside prompt ")
    assert "with base" in by_adapter["one"].message


def test_a_failure_in_decoding_shrinks_to_a_token_and_a_step(
    llama_with_adapter: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = AdapterSession.run_with_ort_values

    def no_adapter_later(self: Any, outputs: Any, feeds: Any, adapters: Any, **buffers: Any) -> Any:
        later = feeds["input_ids"].shape[1] == 1 < feeds["attention_mask"].shape[1]
        return right(self, outputs, feeds, None if later else adapters, **buffers)

    monkeypatch.setattr(AdapterSession, "run_with_ort_values", no_adapter_later)
    report = check(llama_with_adapter, backends=["onnx-side-inputs"], shrink=True)
    (example,) = report.counterexamples
    assert (example.adapter, len(example.tokens)) == ("one", 2)
    assert example.message.startswith("decode, beside prompt ")


def test_a_backend_that_raises_has_a_counterexample(
    llama_with_adapter: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = AdapterSession.run_with_ort_values

    def no_long_rows(self: Any, outputs: Any, feeds: Any, adapters: Any, **buffers: Any) -> Any:
        if feeds["input_ids"].shape[1] > 4:
            raise RuntimeError("too long")
        return right(self, outputs, feeds, adapters, **buffers)

    monkeypatch.setattr(AdapterSession, "run_with_ort_values", no_long_rows)
    report = check(llama_with_adapter, backends=["onnx-native", "onnx-side-inputs"], shrink=True)
    found = {(len(e.tokens), e.message) for e in report.counterexamples}
    assert found == {(5, "prefill: RuntimeError: too long")}


def test_a_few_of_many_failures_are_shrunk_and_the_rest_are_counted(
    llama_with_adapter: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loradeploy.parity.backends.onnx_model import OnnxModel

    right = OnnxModel.forward

    def shifted(self: Any, *arguments: Any) -> Any:
        values, cache = right(self, *arguments)
        return values + 1, cache

    monkeypatch.setattr(OnnxModel, "forward", shifted)
    report = check(llama_with_adapter, shrink=True)
    assert len(report.counterexamples) == MOST
    assert any("was searched for in 3 of " in note for note in report.notes)


def test_an_error_in_the_search_is_a_remark_and_the_verdict_is_kept(
    llama_bundle: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(context: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(job, "load_base", fail)
    change_graph(llama_bundle, see_the_future_in_chunks)
    report = check(llama_bundle, backends=["onnx-side-inputs"], shrink=True)
    assert not report.passed
    assert report.counterexamples == ()
    assert any("search for the smallest failing input ended" in note for note in report.notes)
