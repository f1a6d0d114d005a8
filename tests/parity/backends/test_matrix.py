"""The variants of a parity check: providers, optimization levels, phases, and repeated runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import pytest

import loradeploy as ld
from loradeploy.adapter.adapter import Adapter, Factors, Rows
from loradeploy.adapter.config import AdapterConfig
from loradeploy.errors import UsageError
from loradeploy.parity import job
from loradeploy.parity.checks import check as checking
from loradeploy.parity.checks.rows import same_everywhere
from loradeploy.parity.context import AdapterUnderTest
from loradeploy.parity.names import LEVELS
from loradeploy.parity.phases import choice, run
from loradeploy.parity.phases.choice import phases_of
from loradeploy.parity.report.results import ParityReport, Variant
from loradeploy.parity.variants import choose_variants, session_options, start
from loradeploy.runtime.devices.providers import resolve
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter
from tests.parity.conftest import CPU, CUDA, PROMPTS, Check, without_cuda
from tests.parity.tampering import change_graph, leave_dropout_on, see_the_future_in_chunks


def failed(report: ParityReport) -> set[str | None]:
    """Return the phases that have a failure."""
    return {result.phase for result in report.results if result.outcome == "failed"}


# -- providers and levels ----------------------------------------------------------------------


def test_a_check_runs_by_default_on_the_cpu_at_the_highest_optimization_level() -> None:
    assert choose_variants(None, None).each == (Variant("cpu", "all"),)


def test_every_provider_runs_at_every_level_once() -> None:
    found = choose_variants(["cpu", CPU, "CPU"], ["all", "basic", "all"])
    assert found.each == (Variant("cpu", "all"), Variant("cpu", "basic"))


@pytest.mark.skipif(
    "TensorrtExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs an onnxruntime with TensorRT",
)
@pytest.mark.parametrize(
    ("provider", "label", "chain"),
    [
        ("tensorrt", "tensorrt", ["TensorrtExecutionProvider", CUDA]),
        ("tensorrt:1", "tensorrt:1", ["TensorrtExecutionProvider", CUDA]),
        ("TensorrtExecutionProvider", "TensorrtExecutionProvider", ["TensorrtExecutionProvider"]),
        ("cuda:1", "cuda:1", [CUDA]),
        (("cuda", {"use_tf32": 0}), "cuda use_tf32=0", [CUDA]),
        ("CPUExecutionProvider", "cpu", [CPU]),
    ],
    ids=str,
)
def test_a_variant_has_the_same_provider_list_as_a_session(
    provider: Any, label: str, chain: list[str]
) -> None:
    found = choose_variants([provider], None)
    assert found.each == (Variant(label, "all"),)
    assert found.chains[label] == resolve([provider])
    assert [name for name, _ in found.chains[label]] == chain


@pytest.mark.parametrize(
    ("providers", "levels", "message"),
    [
        (["nonsense"], None, "no 'nonsense'"),
        ([], None, "nothing would be run"),
        (None, [], "nothing would be run"),
        (None, ["O3"], "'O3' is not a level of optimization: there are disable, basic"),
    ],
)
def test_an_unknown_variant_is_refused(
    providers: list[str] | None, levels: list[str] | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_variants(providers, levels)


def test_each_level_is_a_different_level_of_onnxruntime() -> None:
    options = [session_options(Variant("cpu", level)) for level in LEVELS]
    assert len({option.graph_optimization_level for option in options}) == len(LEVELS)


def test_every_level_is_a_separate_column(llama_with_adapter: Path, check: Check) -> None:
    report = check(
        llama_with_adapter,
        optimization=["disable", "all"],
        backends=["onnx-side-inputs", "torch-merged"],
        phases=["prefill"],
    )
    assert report.passed, report.failures
    seen = {(r.backend, r.variant) for r in report.results}
    assert seen == {
        ("torch-merged", None),
        ("onnx-side-inputs", Variant("cpu", "disable")),
        ("onnx-side-inputs", Variant("cpu", "all")),
    }


def test_only_the_level_at_which_the_numbers_change_fails(
    llama_with_adapter: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = AdapterSession.__init__
    right = AdapterSession.run_with_ort_values
    broken = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED

    def note(self: Any, *arguments: Any, session_options: Any, **options: Any) -> None:
        opened(self, *arguments, session_options=session_options, **options)
        self.broken = session_options.graph_optimization_level == broken

    def run(self: Any, outputs: Any, feeds: Any, adapters: Any, **buffers: Any) -> Any:
        return right(self, outputs, feeds, None if self.broken else adapters, **buffers)

    monkeypatch.setattr(AdapterSession, "__init__", note)
    monkeypatch.setattr(AdapterSession, "run_with_ort_values", run)
    report = check(
        llama_with_adapter,
        optimization=["basic", "extended", "all"],
        backends=["onnx-side-inputs"],
        phases=["prefill"],
    )
    wrong = [result.variant for result in report.results if result.outcome == "failed"]
    assert wrong == [Variant("cpu", "extended")]
    assert "cpu, extended" in report.failures[0]


@without_cuda
def test_a_provider_that_does_not_start_is_refused_rather_than_replaced(
    llama_with_adapter: Path, check: Check
) -> None:
    with pytest.raises(UsageError, match="CUDAExecutionProvider is installed but does not start"):
        check(llama_with_adapter, providers=["cuda", "cpu"])


@pytest.mark.gpu
def test_cuda_is_a_column_and_the_nodes_it_leaves_to_the_cpu_are_reported(
    llama_with_adapter: Path, check: Check
) -> None:
    report = check(llama_with_adapter, providers=["cuda", "cpu"], backends=["onnx-side-inputs"])
    assert report.passed, report.failures
    assert {r.variant for r in report.results} == {Variant("cuda", "all"), Variant("cpu", "all")}
    assert [facts.provider for facts in report.environment.providers] == ["cuda", "cpu"]


def test_the_placement_of_nodes_is_not_reported_for_the_cpu(llama_with_adapter: Path) -> None:
    started = start(llama_with_adapter, choose_variants(["cpu"], None))
    assert started.notes == ()
    (facts,) = started.providers
    assert (facts.chain, facts.version) == ((CPU,), onnxruntime.__version__)
    assert facts.device is not None
    assert facts.device.kind == "CPU"


def test_progress_counts_every_run(
    llama_with_adapter: Path, check: Check, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "loradeploy.parity")
    backends = ["torch-merged", "onnx-side-inputs", "onnx-mixed"]
    check(
        llama_with_adapter, backends=backends, phases=["padded-batch", "prefill"],
        optimization=["basic", "all"],
    )  # fmt: skip
    begun = [record.message for record in caplog.records if "[" in record.message]
    left = re.compile(r" \(about \d+ (s|min) left\)$")
    assert [bool(left.search(line)) for line in begun] == [False] + [True] * 6, begun
    assert [left.sub("", line) for line in begun] == [
        "[1/7] PyTorch merged, one",
        "[2/7] ONNX side inputs, base, cpu, basic",
        "[3/7] ONNX side inputs, one, cpu, basic",
        "[4/7] ONNX side inputs, base, cpu, all",
        "[5/7] ONNX side inputs, one, cpu, all",
        "[6/7] ONNX mixed batch, mixed, cpu, basic",
        "[7/7] ONNX mixed batch, mixed, cpu, all",
    ]


FACTORS: Final = Factors(np.ones((2, 4)), np.ones((4, 2)))


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({}, True),
        ({"rows": {"embed_tokens.weight": Rows((3,), np.ones((1, 4)))}}, False),
        ({"saved": {"lm_head.weight": np.ones((4, 4))}}, False),
        ({"carried": {"embed_tokens.weight": np.ones((9, 4))}}, False),
        ({"factors": {"e": Factors(np.ones((2, 9)), np.ones((4, 2)), kind="embedding")}}, False),
        (
            {
                "factors": {
                    "e": Factors(np.ones((4, 4)), np.ones((4, 4)), kind="experts", experts=2)
                }
            },
            False,
        ),
        ({"factors": {"l.mlp.experts.7.up_proj": FACTORS}}, False),
        ({"factors": {"l.mlp.shared_experts.up_proj": FACTORS}}, True),
    ],
    ids=[
        "linear layers",
        "a trained token",
        "a head",
        "carried weights",
        "an embedding",
        "experts",
        "separate experts",
        "an expert of every token",
    ],
)
def test_an_adapter_that_depends_on_token_ids_runs_on_all_rows_in_pytorch(
    changed: dict[str, Any], same: bool
) -> None:
    factors = {"q": FACTORS}
    adapter = Adapter(AdapterConfig(r=2, lora_alpha=2), **{"factors": factors, **changed})
    under_test = AdapterUnderTest("a", Path(), adapter, adapter.digest)
    other = Adapter(AdapterConfig(r=2, lora_alpha=2), factors=factors)
    both = [AdapterUnderTest("b", Path(), other, other.digest), under_test]
    assert same_everywhere(both, "a") is same
    assert same_everywhere(both, "b")
    assert same_everywhere(both, None), "the base is the reference's own"


# -- phases ------------------------------------------------------------------------------------


def test_a_decoder_is_compared_in_every_phase(llama_with_adapter: Path, check: Check) -> None:
    report = check(llama_with_adapter, backends=["onnx-side-inputs"])
    assert report.passed, report.failures
    assert {result.phase for result in report.results} == set(phases_of("causal-lm"))


def test_phases_can_be_chosen_by_their_names_with_dashes(
    llama_with_adapter: Path, check: Check
) -> None:
    report = check(
        llama_with_adapter,
        phases=["padded-batch", "chunked prefill"],
        backends=["onnx-side-inputs", "torch-merged"],
    )
    phases = {r.phase for r in report.results if r.outcome == "passed"}
    assert phases == {"padded batch", "chunked prefill"}
    (left_out,) = (r for r in report.results if r.outcome == "not run")
    assert left_out.backend == "torch-merged"
    assert "it has none of the phases chunked prefill, padded batch" in str(left_out.message)


def test_a_mask_that_is_wrong_past_the_cache_fails_in_chunks_alone(
    llama_bundle: Path, check: Check
) -> None:
    change_graph(llama_bundle, see_the_future_in_chunks)
    assert failed(check(llama_bundle, backends=["onnx-side-inputs"])) == {"chunked prefill"}


def test_adapters_of_an_earlier_batch_fail_in_the_permuted_batch(
    llama_with_adapter: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = AdapterSession.run_with_ort_values
    first: dict[int, Any] = {}

    def stale(self: Any, outputs: Any, feeds: Any, adapters: Any, **buffers: Any) -> Any:
        return right(self, outputs, feeds, first.setdefault(len(adapters), adapters), **buffers)

    monkeypatch.setattr(AdapterSession, "run_with_ort_values", stale)
    assert failed(check(llama_with_adapter, backends=["onnx-mixed"])) == {"permuted batch"}


def test_a_check_of_the_repeat_phase_alone_does_not_certify(
    llama_with_adapter: Path, check: Check
) -> None:
    report = check(llama_with_adapter, backends=["onnx-side-inputs"], phases=["repeat"])
    assert {result.outcome for result in report.results} == {"passed"}
    assert not report.passed


# -- repetition --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "outcome", "expected"),
    [
        (0.1, "failed", "two runs differ: max abs 0.1 > "),
        (3e-7, "passed", "two runs differ by up to"),
    ],
)
def test_a_nondeterministic_graph_fails_or_is_reported(
    share: float, outcome: str, expected: str, llama_bundle: Path, check: Check
) -> None:
    change_graph(llama_bundle, leave_dropout_on(share))
    report = check(llama_bundle, backends=["onnx-side-inputs"])
    repeated = [result for result in report.results if result.phase == "repeat"]
    assert {result.outcome for result in repeated} == {outcome}
    assert all(expected in str(result.message) for result in repeated), repeated


def test_a_deterministic_graph_is_reported_as_such(llama_with_adapter: Path, check: Check) -> None:
    report = check(llama_with_adapter, backends=["onnx-side-inputs"])
    messages = {result.message for result in report.results if result.phase == "repeat"}
    assert messages == {"bit for bit equal"}


def test_a_nondeterministic_reference_is_the_only_failure(
    tiny_gpt2: Path, tiny_gpt2_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = job.load_model
    monkeypatch.setattr(job, "load_model", lambda context: right(context).train())  # dropout is on
    report = ld.parity(
        tiny_gpt2_bundle, model=tiny_gpt2, prompts=PROMPTS, tokens=2, certificate=False
    )
    (failure, *_) = report.failures
    assert "the reference is nondeterministic: two runs differ by" in failure
    assert [result.backend for result in report.results] == ["torch"]


def test_every_adapter_of_a_bundle_is_in_the_permuted_batch(
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    make_adapter: MakeAdapter,
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {f"a{seed}": make_adapter(tiny_llama, seed=seed) for seed in range(1, 6)}
    options: dict[str, Any] = {"adapters": given, "backends": ["onnx-mixed"]}
    report = check(tiny_llama_bundle, phases=["permuted batch"], **options)
    assert report.passed, report.failures
    assert {result.adapter for result in report.results} == {None, *given}
    for module in (choice, run, checking):  # without it, only the first four rows would be permuted
        monkeypatch.setattr(module, "rows_of", lambda phase, rows, batched=True: rows[:4])
    report = check(tiny_llama_bundle, phases=["permuted batch"], **options)
    skipped = {r.adapter: r.message for r in report.results if r.outcome == "not run"}
    assert set(skipped) == {"a4", "a5"}
    assert skipped["a4"] == "permuted batch: no row of a4 is among those of this phase"
