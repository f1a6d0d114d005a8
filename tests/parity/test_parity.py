"""The whole parity check on tiny models: correct bundles pass, wrong ones fail."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.adapter.adapter import Adapter, Factors
from loradeploy.adapter.files.peft import load_adapter, save_adapter
from loradeploy.bundle.adapter_inputs.native import write_onnx_adapter
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import BundleError, LoraDeployError, ModelError, UsageError
from loradeploy.parity.checks.mistakes import MISTAKES, AdapterMistake
from loradeploy.parity.report.results import ParityReport
from loradeploy.runtime.session import AdapterSession
from tests.cli.calling import exit_status
from tests.conftest import MakeAdapter, generated_tokens
from tests.parity.conftest import PROMPTS

# The controls that apply to an adapter with only low-rank factors.
OF_PARTS = ("ignored", "swapped tokens", "swapped labels")
OF_ANY = [mistake for mistake in MISTAKES if not mistake.name.startswith(OF_PARTS)]
Parity = Callable[..., ParityReport]


@pytest.fixture
def parity() -> Parity:
    """A function that runs `loradeploy.parity` with few prompts and writes no certificate."""
    quick = {"prompts": PROMPTS, "certificate": False, "shrink": False}

    def run(bundle: Path, **options: Any) -> ParityReport:
        given = {**quick, "tokens": generated_tokens(bundle, 5), **options}
        return ld.parity(bundle, **given)

    return run


@pytest.fixture
def adapter(tiny_llama: Path, make_adapter: MakeAdapter) -> Path:
    return make_adapter(tiny_llama, seed=1)


@pytest.fixture
def other(tiny_llama: Path, make_adapter: MakeAdapter) -> Path:
    """An adapter of another rank that covers some of the layers."""
    return make_adapter(tiny_llama, seed=2, r=8, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def bundle(tiny_llama_bundle: Path, adapter: Path, tmp_path: Path) -> Path:
    """A bundle of the tiny Llama with side inputs and one adapter; tests may modify it."""
    ld.export(tiny_llama_bundle, tmp_path / "bundle", adapters={"one": adapter})
    return tmp_path / "bundle"


def change(adapter: Path, place: Path, make: Callable[[Adapter], Adapter | None]) -> Path:
    """Write the adapter that `make` returns for the adapter in the directory `adapter`."""
    changed = make(load_adapter(adapter))
    assert changed is not None
    save_adapter(changed, place)
    return place


def outcomes(report: ParityReport) -> set[tuple[str, str]]:
    """Return (backend, outcome) of all results except those of repeated runs."""
    return {(r.backend, r.outcome) for r in report.results if r.phase != "repeat"}


# -- what agrees -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_every_path_of_a_bundle_agrees_with_pytorch(
    name: str, request: pytest.FixtureRequest, make_adapter: MakeAdapter, parity: Parity
) -> None:
    model = request.getfixturevalue(f"tiny_{name}")
    bundle = request.getfixturevalue(f"tiny_{name}_bundle")
    head: dict[str, Any] = {}
    if name == "bert":
        head = {"task": "sequence-classification", "modules_to_save": ["classifier"]}
    adapters = {r: make_adapter(model, seed=r, r=r, **head) for r in (2, 8)}
    report = parity(bundle, model=model, adapters={f"r{r}": place for r, place in adapters.items()})
    assert report.passed, report.failures
    found = {(r.backend, r.adapter) for r in report.results if r.outcome == "passed"}
    paths = ("torch-merged", "peft", "onnx-merged", "onnx-native")
    assert found == {(path, adapter) for path in paths for adapter in ("r2", "r8")} | {
        (path, adapter)
        for path in ("onnx-side-inputs", "onnx-mixed", "onnx-reference")
        for adapter in (None, "r2", "r8")
    }
    # Without an effect of the adapter the agreement would prove nothing.
    assert all(facts.effect > 0.1 for facts in report.adapters)


def test_a_merged_bundle_agrees_with_pytorch_and_its_adapter(
    tiny_llama: Path, bundle: Path, adapter: Path, tmp_path: Path, parity: Parity
) -> None:
    ld.export(bundle, tmp_path / "merged", adapters=[adapter], merge=True)
    report = parity(tmp_path / "merged", model=tiny_llama, adapters=[adapter])
    assert report.passed, report.failures
    assert {result.backend for result in report.results} == {
        "torch-merged",
        "peft",
        "onnx-merged",
        "onnx-reference",
    }


def test_a_bundle_in_half_precision_agrees_and_its_mistakes_are_still_caught(
    tiny_llama: Path, adapter: Path, tmp_path: Path, parity: Parity
) -> None:
    ld.export(tiny_llama, tmp_path / "half", precision="fp16")
    report = parity(
        tmp_path / "half",
        model=tiny_llama,
        adapters=[adapter],
        backends=["onnx-side-inputs", "onnx-mixed"],
        controls=True,
    )
    assert report.passed, report.failures
    assert len(report.controls) == len(OF_ANY) + 1


def test_the_base_alone_can_be_compared(
    tiny_llama: Path, tiny_llama_bundle: Path, parity: Parity
) -> None:
    report = parity(tiny_llama_bundle, model=tiny_llama)
    assert report.passed, report.failures
    assert {r.backend for r in report.results if r.outcome == "passed"} == {
        "onnx-side-inputs",
        "onnx-reference",
    }
    assert any("only the base was compared" in note for note in report.notes)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_an_untrained_adapter_passes_with_a_remark(
    factor: str,
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    adapter: Path,
    tmp_path: Path,
    parity: Parity,
) -> None:
    """B is zero in an untrained adapter; A is in embeddings, and with the initialization MiCA."""

    def untrained(adapter: Adapter) -> Adapter:
        zero = {
            m: dataclasses.replace(pair, **{factor: getattr(pair, factor) * 0})
            for m, pair in adapter.factors.items()
        }
        return dataclasses.replace(adapter, factors=zero)

    place = change(adapter, tmp_path / "untrained", untrained)
    ld.export(tiny_llama_bundle, tmp_path / "merged", adapters=[place], merge=True)
    for bundle in (tiny_llama_bundle, tmp_path / "merged"):
        report = parity(bundle, model=tiny_llama, adapters=[place], controls=True)
        assert report.passed, report.failures
        assert report.adapters[0].effect == 0
        assert "no effect" in str(report.adapters[0].message)
        assert report.controls == ()
        assert "no control was made with untrained, which has no effect" in report.notes
    # The merged graph is the base's: with a trained adapter it does not agree.
    assert not parity(tmp_path / "merged", model=tiny_llama, adapters=[adapter]).passed


def with_smaller_update(factor: float) -> Callable[[Adapter], Adapter]:
    """Return a function that multiplies the B of all modules by `factor`."""

    def changed(adapter: Adapter) -> Adapter:
        smaller = {m: Factors(pair.A, pair.B * factor) for m, pair in adapter.factors.items()}
        return dataclasses.replace(adapter, factors=smaller)

    return changed


def test_a_nearly_untrained_adapter_fails_with_the_reason(
    tiny_llama: Path, tiny_llama_bundle: Path, adapter: Path, tmp_path: Path, parity: Parity
) -> None:
    place = change(adapter, tmp_path / "barely", with_smaller_update(1e-6))
    options: dict[str, Any] = {"backends": ["onnx-side-inputs"], "shrink": True}
    report = parity(tiny_llama_bundle, model=tiny_llama, adapters=[place], **options)
    failed = [result for result in report.results if result.outcome == "failed"]
    assert failed and all(result.adapter == "barely" for result in failed)
    assert all("nearly untrained" in str(result.message) for result in failed)
    assert not report.localizations and not report.counterexamples  # there is no cause to find


def test_an_adapter_that_changes_nothing_though_it_is_trained_fails(
    tiny_llama: Path, tiny_llama_bundle: Path, adapter: Path, tmp_path: Path, parity: Parity
) -> None:
    place = change(adapter, tmp_path / "ineffective", with_smaller_update(1e-12))
    report = parity(
        tiny_llama_bundle, model=tiny_llama, adapters=[place], backends=["onnx-side-inputs"]
    )
    assert not report.passed
    assert "changes nothing" in str(report.adapters[0].message)


# -- what does not agree -----------------------------------------------------------------------


@pytest.mark.parametrize("mistake", OF_ANY, ids=lambda mistake: mistake.name)
def test_a_merge_with_a_mistake_fails(
    mistake: AdapterMistake,
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    adapter: Path,
    tmp_path: Path,
    parity: Parity,
) -> None:
    wrong = change(adapter, tmp_path / "wrong", mistake.make)
    ld.export(tiny_llama_bundle, tmp_path / "merged", adapters={"it": wrong}, merge=True)
    report = parity(
        tmp_path / "merged",
        model=tiny_llama,
        adapters={"it": adapter},
        backends=["onnx-merged"],
    )
    assert not report.passed
    assert {outcome for _, outcome in outcomes(report)} == {"failed"}


@pytest.mark.parametrize("mistake", OF_ANY, ids=lambda mistake: mistake.name)
def test_a_native_adapter_with_a_mistake_fails(
    mistake: AdapterMistake, tiny_llama: Path, bundle: Path, adapter: Path, parity: Parity
) -> None:
    wrong = mistake.make(load_adapter(adapter))
    assert wrong is not None
    write_onnx_adapter(wrong, read_manifest(bundle), bundle / "adapters/one.onnx_adapter")
    report = parity(bundle, model=tiny_llama, backends=["onnx-native", "onnx-side-inputs"])
    assert outcomes(report) == {("onnx-native", "failed"), ("onnx-side-inputs", "passed")}


def test_rows_with_the_adapter_of_their_neighbor_fail(
    tiny_llama: Path,
    bundle: Path,
    other: Path,
    parity: Parity,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = AdapterSession.run_with_ort_values

    def off_by_one(self: Any, outputs: Any, feeds: Any, adapters: Any, **places: Any) -> Any:
        if isinstance(adapters, list):
            adapters = [*adapters[1:], adapters[0]]
        return right(self, outputs, feeds, adapters, **places)

    monkeypatch.setattr(AdapterSession, "run_with_ort_values", off_by_one)
    report = parity(
        bundle,
        model=tiny_llama,
        adapters={"two": other},
        backends=["onnx-side-inputs", "onnx-mixed"],
    )
    assert outcomes(report) == {("onnx-side-inputs", "passed"), ("onnx-mixed", "failed")}


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_values_that_are_not_finite_fail(
    wrong: float, tiny_llama: Path, bundle: Path, parity: Parity, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoiled:
        def __init__(self, value: Any) -> None:
            self.value = value

        def numpy(self) -> Any:
            values = self.value.numpy().copy()
            values[0, 0, 0] = wrong
            return values

    right = AdapterSession.run_with_ort_values

    def spoil(self: Any, *arguments: Any, **places: Any) -> Any:
        logits, *cache = right(self, *arguments, **places)
        return [Spoiled(logits), *cache]

    monkeypatch.setattr(AdapterSession, "run_with_ort_values", spoil)
    report = parity(bundle, model=tiny_llama, backends=["onnx-side-inputs"])
    failed = [result for result in report.results if result.phase == "prefill"]
    assert failed
    assert all("NaN or infinite" in str(result.message) for result in failed)
    assert not report.passed


def test_a_backend_that_raises_fails_and_the_others_continue(
    tiny_llama: Path, bundle: Path, parity: Parity, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = AdapterSession.run_with_ort_values

    def fail_late(self: Any, outputs: Any, feeds: Any, adapters: Any, **places: Any) -> Any:
        if len(feeds["input_ids"]) > 1:
            raise RuntimeError("out of memory\nand more")
        return right(self, outputs, feeds, adapters, **places)

    monkeypatch.setattr(AdapterSession, "run_with_ort_values", fail_late)
    report = parity(bundle, model=tiny_llama, backends=["onnx-side-inputs", "onnx-native"])
    messages = {r.phase: r.message for r in report.results if r.backend == "onnx-side-inputs"}
    assert messages == {
        "prefill": None,
        "chunked prefill": None,
        "repeat": "bit for bit equal",
        "padded batch": "RuntimeError: out of memory",
        "permuted batch": "RuntimeError: out of memory",
        "decode": "RuntimeError: out of memory",
    }
    assert ("onnx-native", "failed") not in outcomes(report)


def test_an_output_that_is_missing_fails(
    tiny_llama: Path, bundle: Path, parity: Parity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        AdapterSession, "run_with_ort_values", lambda self, *arguments, **places: []
    )
    report = parity(bundle, model=tiny_llama, backends=["onnx-side-inputs"])
    assert {outcome for _, outcome in outcomes(report)} == {"failed"}


def test_peft_that_is_not_installed_is_named(
    tiny_llama: Path, bundle: Path, parity: Parity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # makes `import peft` fail
    report = parity(bundle, model=tiny_llama)
    assert report.passed, report.failures
    (result,) = (r for r in report.results if r.backend == "peft")
    assert (result.outcome, result.message) == ("not run", "peft is not installed")
    asked = parity(bundle, model=tiny_llama, backends=["peft", "onnx-native"])
    assert asked.failures == ("PEFT was requested but not run: peft is not installed",)


def test_controls_fail_and_do_not_change_the_verdict(
    tiny_llama: Path, bundle: Path, parity: Parity
) -> None:
    report = parity(bundle, model=tiny_llama, backends=["onnx-native"], controls=True)
    assert report.passed, report.failures
    assert {control.name for control in report.controls} == {
        *(mistake.name for mistake in OF_ANY),
        "off-by-one row",
    }


# -- the certificate ---------------------------------------------------------------------------


def test_the_certificate_records_what_was_checked(
    tiny_llama: Path, bundle: Path, adapter: Path, parity: Parity
) -> None:
    parity(bundle, model=tiny_llama, backends=["onnx-native"], certificate=True)
    result = json.loads((bundle / "parity.json").read_text())
    manifest = read_manifest(bundle)
    assert result["passed"] is True
    assert result["base_digest"] == manifest.base.digest
    assert (result["graph_digest"], result["data_digest"]) == (
        manifest.graph_digest,
        manifest.data_digest,
    )
    assert [facts["digest"] for facts in result["adapters"]] == [load_adapter(adapter).digest]
    assert result["environment"]["versions"]["torch"]


# -- bad input ---------------------------------------------------------------------------------


def test_another_base_is_refused(
    bundle: Path, tiny_llama: Path, tmp_path: Path, parity: Parity
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.lm_head.weight.data += 1
    model.save_pretrained(tmp_path / "changed")
    with pytest.raises(ModelError, match="is not the base of"):
        parity(bundle, model=tmp_path / "changed")


def test_the_model_is_found_beside_the_bundle_or_must_be_given(
    bundle: Path, tiny_llama: Path, parity: Parity
) -> None:
    with pytest.raises(UsageError, match=r"give it as `model`.*made from tiny-llama"):
        parity(bundle)
    shutil.copytree(tiny_llama, bundle.parent / tiny_llama.name)
    assert parity(bundle, backends=["onnx-side-inputs"]).passed


def test_a_merged_bundle_needs_its_one_adapter(
    tiny_llama: Path, bundle: Path, adapter: Path, tmp_path: Path, parity: Parity
) -> None:
    ld.export(bundle, tmp_path / "merged", adapters=[adapter], merge=True)
    for adapters in ([], {"a": adapter, "b": adapter}):
        with pytest.raises(UsageError, match="give the one adapter that its graph"):
            parity(tmp_path / "merged", model=tiny_llama, adapters=adapters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"report": ["r.pdf"]}, "a report ends in one of"),
        ({"backends": ["tensorrt"]}, "no backend is named 'tensorrt'"),
        ({"backends": []}, "no backends"),
        ({"phases": ["one-row"]}, "causal-lm has no phase 'one row'"),
        ({"phases": []}, "no phases"),
        ({"optimization": ["most"]}, "'most' is not a level"),
        ({"fuzz": -1}, "give 0 or more"),
        ({"genai_python": "nowhere/python"}, "nowhere/python is not a program"),
        ({"tokens": 0}, "give 1 or more"),
        ({"adapters": ["nowhere"]}, "nowhere does not exist"),
        ({"providers": ["NoSuchProvider"]}, "NoSuchProvider"),
        ({"prompts": "no.txt"}, "no.txt does not exist"),
        ({"evaluate": "no.jsonl"}, "no.jsonl does not exist: give the held-out data"),
        ({"evaluate": {"other": "no.jsonl"}}, "'other' is not scored"),
        ({"baseline": "no.json"}, "no.json does not exist"),
    ],
)
def test_impossible_options_are_refused_before_the_weights_are_read(
    options: dict[str, Any],
    message: str,
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    parity: Parity,
    tmp_path: Path,
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")  # not the base's, if they are read
    with pytest.raises(LoraDeployError, match=message):
        parity(tiny_llama_bundle, model=model, **options)


def test_two_adapters_of_one_name_are_refused(
    tiny_llama: Path, bundle: Path, other: Path, parity: Parity
) -> None:
    with pytest.raises(UsageError, match="two adapters are named 'one'"):
        parity(bundle, model=tiny_llama, adapters={"one": other})


def test_weights_that_changed_since_the_export_are_refused(
    tiny_llama: Path, bundle: Path, parity: Parity
) -> None:
    data = bundle / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x00")
    with pytest.raises(BundleError, match="has changed since the export"):
        parity(bundle, model=tiny_llama)


# -- the command -------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("The capital of France is\nHi\n")
    return file


def test_the_command_exits_with_0_where_all_agree(
    tiny_llama: Path, bundle: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [bundle.parent / f"out/r{ending}" for ending in (".json", ".xml", ".md")]
    options = [option for report in reports for option in ("--report", report)]
    code = exit_status(
        "parity", bundle, "--model", tiny_llama, "--prompts", prompts, "--tokens", 3, *options
    )
    out = capsys.readouterr().out
    assert code == 0, out
    assert out.splitlines()[-1].startswith("parity passed")
    assert "permuted batch" in out and "…" not in out  # no truncation where not a terminal
    assert all(report.stat().st_size for report in reports)
    assert (bundle / "parity.json").read_bytes() == reports[0].read_bytes()


def test_the_command_prints_json(
    tiny_llama: Path, bundle: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ("--backends", "onnx-native,onnx-mixed", "--prompts", prompts, "--json")
    assert exit_status("parity", bundle, "--model", tiny_llama, *only) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {result["backend"] for result in printed["results"]} == {"onnx-native", "onnx-mixed"}


@pytest.mark.parametrize("mistake", MISTAKES[:2], ids=lambda mistake: mistake.name)
def test_the_command_exits_with_1_for_a_graph_with_a_wrong_adapter(
    mistake: AdapterMistake,
    tiny_llama: Path,
    bundle: Path,
    adapter: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = change(adapter, tmp_path / "wrong", mistake.make)
    ld.export(bundle, tmp_path / "merged", adapters=[wrong], merge=True)
    given = ("--model", tiny_llama, "--adapter", adapter, "--prompts", prompts)
    assert exit_status("parity", tmp_path / "merged", *given) == 1
    assert "parity FAILED" in capsys.readouterr().out
    assert json.loads((tmp_path / "merged/parity.json").read_text())["passed"] is False


def test_the_command_exits_with_2_and_one_line_on_bad_input(
    tiny_llama: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("parity", bundle, "--model", tiny_llama, "--report", "r.pdf") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("Error: r.pdf")
    assert output.err.count("\n") == 1
