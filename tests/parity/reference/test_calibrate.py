"""Calibration: the limits come from PyTorch's own rounding errors on the inputs of the check."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loradeploy as ld
from loradeploy.errors import BundleError
from loradeploy.parity.checks import controls
from loradeploy.parity.figures.metrics import Comparison, Figures
from loradeploy.parity.reference.calibrate import evened
from loradeploy.parity.reference.rounding import (
    Activations,
    in_dtype,
    round_to_8_bits,
    rounded_activations,
)
from loradeploy.parity.report.results import ParityReport
from tests.conftest import MakeAdapter
from tests.inputs.architectures import ARCHITECTURES, make_model
from tests.inputs.edits import edited_json

PROMPTS = ["The capital of France is", "Hi", "Shares fell as 日本"]


@pytest.fixture
def model(tiny_llama: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


IDS = torch.arange(3, 40)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("length", [9, 40], ids=["middle", "longest"])
def test_a_row_that_is_rounded_most_decides_the_limits_of_a_small_model(length: int) -> None:
    from loradeploy.parity.phases.rows import Row
    from loradeploy.parity.reference.calibrate import measure_gap

    class Rounded:
        """Outputs of ones, off by 1e-3 in rows of `length` tokens."""

        def forward(self, ids: Any, *_: Any, **__: Any) -> tuple[Any, None]:
            off = 1e-3 if ids.shape[1] == length else 0.0
            return np.ones((*ids.shape, 4)) + off, None

    lengths = [1, 2, 9, 40]
    rows = [Row(n, None, (5,) * n, (), np.ones((n, 4), np.float32)) for n in lengths]
    options: Any = {"scale": 1.0, "logits": False, "embeds": False}
    small, forward = torch.nn.Linear(2, 2), Rounded()
    gap = measure_gap(small, forward, rows, "fp32", {}, **options)  # type: ignore[arg-type]
    assert gap.max_abs == pytest.approx(1e-3)
    assert gap.mean_abs == pytest.approx(1e-3 * length / sum(lengths))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_a_run_in_another_dtype_equals_a_cast_model_and_restores_the_model(
    dtype: str, model: torch.nn.Module, tiny_llama: Path
) -> None:
    from transformers import AutoModelForCausalLM

    before = logits(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with in_dtype(model, dtype):
        here = logits(model)
    assert here.dtype == getattr(torch, dtype)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    cast = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=getattr(torch, dtype)).eval()
    assert torch.equal(here, logits(cast))
    assert not torch.equal(here.double(), before.double())


def test_a_t5_can_be_computed_in_float64(tiny_t5: Path) -> None:
    """Its feed-forward layers cast their inputs to the dtype of the weights of the second one."""
    from transformers import AutoModelForSeq2SeqLM

    t5 = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).eval()

    def outputs(model: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits

    before = outputs(t5)
    with in_dtype(t5, "float64"):
        here = outputs(t5)
    assert torch.equal(outputs(t5), before)
    exact = outputs(t5.double())
    assert here.dtype == torch.float64
    assert (here - exact).abs().max() < (before - exact).abs().max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_t5_with_an_adapter_can_be_computed_in_16_bits(
    dtype: str, tiny_t5: Path, make_adapter: MakeAdapter
) -> None:
    from transformers import AutoModelForSeq2SeqLM

    from loradeploy.lora.inject import adapted

    adapter = ld.load_adapter(make_adapter(tiny_t5, task="seq2seq-lm"))
    t5 = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).eval()
    with adapted(t5, adapter), torch.inference_mode():
        before = t5(input_ids=IDS, decoder_input_ids=IDS).logits
        with in_dtype(t5, dtype):
            here = t5(input_ids=IDS, decoder_input_ids=IDS).logits
    assert here.dtype == getattr(torch, dtype)
    assert 0 < (here - before).abs().max() < before.abs().max() / 10


def test_a_mixture_of_experts_can_be_computed_in_float64(tmp_path: Path) -> None:
    """transformers' grouped product of experts takes no float64."""
    from transformers import AutoModelForCausalLM

    place = make_model(tmp_path / "model", *ARCHITECTURES["mixtral: a mixture of experts"])
    mixture = AutoModelForCausalLM.from_pretrained(place).eval()
    how = mixture.config._experts_implementation
    ids = IDS % mixture.config.vocab_size

    def outputs() -> torch.Tensor:
        with torch.inference_mode():
            return mixture(input_ids=ids).logits

    before = outputs()
    with in_dtype(mixture, "float64"):
        here = outputs()
    assert here.dtype == torch.float64
    assert torch.equal(outputs(), before) and mixture.config._experts_implementation == how
    mixture.set_experts_implementation("eager")
    exact = mixture.double()(input_ids=ids).logits
    assert (here - exact).abs().max() < (before - exact).abs().max()


def test_a_second_run_in_another_dtype_repeats_the_first(model: torch.nn.Module) -> None:
    with in_dtype(model, "float64"):
        first = logits(model)
        with torch.inference_mode():
            other = model(input_ids=IDS.flip(1)).logits
        assert torch.equal(logits(model), first)
        with torch.no_grad():  # memory allocated in one mode is reused in the other
            assert torch.equal(model(input_ids=IDS).logits, first)
    assert not torch.equal(other, first)


def test_a_run_that_fails_in_another_dtype_restores_the_model(model: torch.nn.Module) -> None:
    def fail(module: torch.nn.Module, inputs: object, output: object) -> None:
        raise ValueError

    before = logits(model)
    failing = model.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(fail)
    with in_dtype(model, "float64"):
        with pytest.raises(ValueError):
            logits(model)
        failing.remove()
        here = logits(model)
    assert torch.equal(logits(model), before)
    with in_dtype(model, "float64"):
        assert torch.equal(logits(model), here)


def test_images_are_cast_where_a_convolution_embeds_them() -> None:
    layers = (torch.nn.Conv2d(3, 4, 2, stride=2), torch.nn.Flatten(), torch.nn.Linear(36, 5))
    tower, images = torch.nn.Sequential(*layers), torch.randn(2, 3, 6, 6)
    with torch.inference_mode():
        before = tower(images)
        for dtype in (torch.float64, torch.bfloat16):
            with in_dtype(tower, str(dtype).removeprefix("torch.")):
                here = tower(images)
            assert torch.equal(here, copy.deepcopy(tower).to(dtype)(images.to(dtype)))
            assert not torch.equal(here.double(), before.double())
        assert torch.equal(tower(images), before)


def test_the_error_of_rounding_to_8_bits_is_at_most_half_a_step_of_the_block() -> None:
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    x[:, 40] *= 100  # an outlier affects only its own block
    off = (round_to_8_bits(x, 32) - x).abs()
    steps = torch.stack([x[:, begin : begin + 32].abs().amax(1) / 127 for begin in (0, 32, 64)], 1)
    assert (off <= steps.repeat_interleave(32, 1)[:, :70] * 0.5001).all()
    assert off[:, :32].max() < off[:, 32:64].max() / 10
    assert (round_to_8_bits(x, None) - x).abs().max() <= x.abs().max() / 127 * 0.5001
    assert torch.equal(round_to_8_bits(torch.zeros(2, 3), 32), torch.zeros(2, 3))


def test_rounded_activations_change_only_the_named_products(model: torch.nn.Module) -> None:
    before = logits(model)
    with rounded_activations(model, {"model.layers.1.mlp.down_proj": Activations(32)}):
        rounded = logits(model)
    assert 0 < float((rounded - before).abs().max()) < float(before.abs().max())
    assert torch.equal(logits(model), before)


def test_a_long_row_with_the_largest_error_has_no_greater_weight_in_a_mean() -> None:
    def figures(*rows: tuple[int, float]) -> Figures:
        found = Comparison(scale=1.0, logits=False)
        for positions, error in rows:
            expected = np.ones((positions, 4), np.float32)
            found.add(expected, expected + np.float32(error))
        return found.figures()

    short, long = (1, 0.25), (99, 0.5)
    found = evened(figures(short, long), [figures(short), figures(long)])
    assert found.max_abs == 0.5
    assert found.mean_abs == pytest.approx(0.375)
    assert found.mean_abs < 0.49 < figures(short, long).mean_abs
    assert found.p99_abs == pytest.approx(0.375, rel=0.01)
    swapped = ((99, 0.25), (1, 0.5))
    pooled = figures(*swapped)
    kept = evened(pooled, [figures(row) for row in swapped])
    assert (kept.mean_abs, kept.p99_abs) == (pooled.mean_abs, pooled.p99_abs), "it loosens nothing"


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, make_adapter: MakeAdapter) -> Path:
    return make_adapter(tiny_llama, seed=1, scale=0.1)


def parity(bundle: Path, model: Path, adapter: Path, **options: object) -> ParityReport:
    given = {"backends": ["onnx-side-inputs", "onnx-mixed"], "prompts": PROMPTS, "tokens": 4}
    return ld.parity(
        bundle,
        model=model,
        adapters={"a": adapter},
        certificate=False,
        **{**given, **options},  # type: ignore[arg-type]
    )


def limit(report: ParityReport, metric: str) -> float:
    return max(
        check.limit
        for result in report.results
        for check in result.checks
        if check.metric == metric
    )


@pytest.fixture(scope="module", params=["int8", "int4"])
def packed(
    request: pytest.FixtureRequest,
    tiny_llama_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    place = tmp_path_factory.mktemp("packed") / request.param
    ld.export(tiny_llama_bundle, place, precision=request.param)
    return place


def test_a_packed_bundle_agrees_with_its_own_weights(
    packed: Path, tiny_llama: Path, adapter: Path
) -> None:
    report = parity(packed, tiny_llama, adapter)
    assert report.passed, report.failures
    reasons = {c.reason for r in report.results for c in r.checks if c.metric == "max_abs"}
    assert all("rounded to 8 bits" in reason for reason in reasons)
    assert any("the verdict applies to cpu, not to other providers" in n for n in report.notes)
    assert 1e-3 < limit(report, "max_abs") < report.adapters[0].effect


def test_another_adapter_in_a_packed_bundle_fails(
    packed: Path,
    tiny_llama: Path,
    adapter: Path,
    make_adapter: MakeAdapter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loradeploy.runtime.session import AdapterSession

    wrong = make_adapter(tiny_llama, seed=9, scale=0.1)
    right = AdapterSession.load
    monkeypatch.setattr(
        AdapterSession, "load", lambda self, name, place=None: right(self, name, wrong)
    )
    report = parity(packed, tiny_llama, adapter)
    held = [r for r in report.results if r.adapter == "a" and r.phase != "repeat"]
    assert {r.outcome for r in held} == {"failed"}


def test_packed_weights_of_another_model_are_refused(
    packed: Path, tiny_llama: Path, adapter: Path, tmp_path: Path
) -> None:
    import shutil

    import onnx
    from onnx import numpy_helper

    from loradeploy.adapter.files.digest import file_digest

    shutil.copytree(packed, tmp_path / "b")
    graph = onnx.load(tmp_path / "b/model.onnx")
    scales = next(
        t for t in graph.graph.initializer if "down_proj" in t.name and t.name.endswith(".scales")
    )
    turned = numpy_helper.to_array(scales)[::-1].copy() * 2
    scales.CopyFrom(numpy_helper.from_array(turned, scales.name))
    onnx.save(graph, tmp_path / "b/model.onnx", save_as_external_data=False)
    with edited_json(tmp_path / "b/loradeploy.json") as result:
        result["graph_digest"] = file_digest(tmp_path / "b/model.onnx")
    with pytest.raises(BundleError, match=r"down_proj is not the base's: a row is off by \d+%"):
        parity(tmp_path / "b", tiny_llama, adapter)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_merged_packed_bundle_contains_the_rounded_merge(
    precision: str,
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    adapter: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    other = make_adapter(tiny_llama, seed=9, scale=0.1)
    for name, held in (("right", adapter), ("wrong", other)):
        ld.export(
            tiny_llama_bundle, tmp_path / name, adapters=[held], merge=True, precision=precision
        )
    report = parity(tmp_path / "right", tiny_llama, adapter, backends=None)
    assert report.passed, report.failures
    assert {(r.backend, r.outcome) for r in report.results} >= {
        ("onnx-merged", "passed"),
        ("torch-merged", "not run"),
        ("peft", "not run"),
    }
    report = parity(tmp_path / "wrong", tiny_llama, adapter, backends=["onnx-merged"])
    outcomes = {result.outcome for result in report.results if result.phase != "repeat"}
    assert outcomes == {"failed"}


def test_a_control_differs_from_a_merged_packed_reference_only_by_its_mistake(
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ld.export(tiny_llama_bundle, tmp_path / "b", adapters=[adapter], merge=True, precision="int4")
    none = controls.AdapterMistake("none", "no mistake at all", lambda right: right)
    monkeypatch.setattr(controls, "MISTAKES", (none, *controls.MISTAKES[:1]))
    report = parity(tmp_path / "b", tiny_llama, adapter, backends=["onnx-merged"], controls=True)
    caught = {control.name: control.caught for control in report.controls}
    assert (caught["none"], caught["wrong adapter"]) == (False, True)


def test_limits_follow_the_precision_of_the_bundle(
    tiny_llama: Path, tiny_llama_bundle: Path, adapter: Path, tmp_path: Path
) -> None:
    ld.export(tiny_llama, tmp_path / "half", precision="fp16")
    whole = parity(tiny_llama_bundle, tiny_llama, adapter)
    half = parity(tmp_path / "half", tiny_llama, adapter)
    assert whole.passed and half.passed
    assert limit(half, "max_abs") > 100 * limit(whole, "max_abs")


def test_limits_that_cannot_be_measured_are_assumed_and_the_report_says_so(
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def mixes(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        x = x @ torch.eye(x.shape[-1])  # float64 cannot be multiplied with float32
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    monkeypatch.setattr(LlamaMLP, "forward", mixes)
    report = parity(tiny_llama_bundle, tiny_llama, adapter, backends=["onnx-side-inputs"])
    assert report.passed, report.failures
    assumed = [note for note in report.notes if note.startswith("the limits are assumed")]
    one, other = sorted(assumed, key=len)
    name = report.adapters[0].name
    assert f"with {name} cannot run" not in one  # the base itself mixes dtypes
    assert f"with {name} cannot run" in other
    assert np.isfinite(limit(report, "max_abs"))
