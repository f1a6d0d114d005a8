"""Long runs: evaluation, early stopping, interruption, kills, and resuming."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from loradeploy.adapter import load_adapter
from loradeploy.errors import (
    MissingDependencyError,
    TrainingError,
    TrainingInterruptedError,
    UsageError,
)
from loradeploy.train.loop.trainer import AdapterTrainer
from loradeploy.train.reporting.callbacks import TensorBoard
from tests.conftest import ROOT
from tests.tolerances import tolerance
from tests.train.conftest import Quick

EVALUATED = {"validation_split": 0.25, "eval_steps": 2}
# A learning rate at which the evaluation loss first falls and then never settles.
RUINOUS = {
    **EVALUATED,
    "max_steps": 24,
    "learning_rate": 8.0,
    "schedule": "constant",
    "warmup_steps": 0,
}


def curve_of(adapter: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((adapter / "loss.csv").read_text().splitlines()))


def evaluations(adapter: Path) -> dict[int, float]:
    """Return the evaluation losses by step."""
    rows = curve_of(adapter)
    return {int(row["step"]): float(row["eval_loss"]) for row in rows if row["eval_loss"]}


def test_a_run_is_evaluated_during_training(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    result = quick(tiny_llama, lessons, tmp_path / "adapter", max_steps=6, **EVALUATED)
    found = evaluations(result.adapter)
    assert list(found) == [2, 4, 6]
    assert found[6] == pytest.approx(result.loss_after, rel=1e-6)
    assert result.evaluated_on == "validation"


def test_evaluating_does_not_change_the_adapter(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    settings = {"validation_split": 0.25, "dropout": 0.2}
    plain = quick(tiny_llama, lessons, tmp_path / "plain", **settings)
    watched = quick(tiny_llama, lessons, tmp_path / "watched", eval_steps=1, **settings)
    assert watched.digest == plain.digest


def test_the_best_adapter_is_kept_on_request(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    last = quick(tiny_llama, lessons, tmp_path / "last", **RUINOUS)
    best = quick(tiny_llama, lessons, tmp_path / "best", keep_best=True, **RUINOUS)
    found = evaluations(best.adapter)
    assert best.kept_step == min(found, key=lambda step: found[step]) < best.steps
    assert best.loss_after == pytest.approx(min(found.values()), rel=1e-5)
    assert best.loss_after < last.loss_after
    assert load_adapter(best.adapter).digest == best.digest != last.digest
    assert last.kept_step == last.steps == 24


def test_a_run_stops_after_the_given_number_of_evaluations_without_improvement(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    result = quick(tiny_llama, lessons, tmp_path / "adapter", early_stopping=2, **RUINOUS)
    found = evaluations(result.adapter)
    best = min(found, key=lambda step: found[step])
    assert result.steps == best + 2 * EVALUATED["eval_steps"] < RUINOUS["max_steps"]


@pytest.mark.parametrize("setting", [{"early_stopping": 2}, {"keep_best": True}])
def test_settings_that_need_evaluations_are_refused_without_them(
    setting: dict[str, Any], tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    with pytest.raises(UsageError, match="needs evaluations: set `eval_steps`"):
        quick(tiny_llama, lessons, tmp_path / "adapter", **setting)
    with pytest.raises(UsageError, match="not trained on: set `validation` or"):
        quick(tiny_llama, lessons, tmp_path / "adapter", eval_steps=2, **setting)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send this process a signal in the middle of a step."""
    whole, pending = AdapterTrainer.training_step, [number]

    def interrupted(self: AdapterTrainer, *inputs: Any) -> Any:
        if self.state.global_step + 1 == step and pending:
            pending.clear()
            os.kill(os.getpid(), number)
        return whole(self, *inputs)

    monkeypatch.setattr(AdapterTrainer, "training_step", interrupted)


@pytest.mark.breadth(3)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.2},
        {"dropout": 0.2, "gradient_accumulation": 2},
        {"group_by_length": True},
        {"keep_best": True, "early_stopping": 3, **EVALUATED, "learning_rate": 0.05},
    ],
    ids=["dropout", "accumulation", "by-length", "best"],
)
def test_an_interrupted_run_is_resumed_to_the_same_adapter(
    settings: dict[str, Any],
    number: signal.Signals,
    tiny_llama: Path,
    lessons: Path,
    tmp_path: Path,
    quick: Quick,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"max_steps": 8, **settings}
    whole = quick(tiny_llama, lessons, tmp_path / "whole", **settings)
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, number)
        with pytest.raises(
            TrainingInterruptedError, match=r"stopped after step 5, .*checkpoint-5"
        ) as stop:
            quick(tiny_llama, lessons, tmp_path / "cut", **settings)
    assert stop.value.status == 128 + number
    assert signal.getsignal(number) is handler
    assert not (tmp_path / "cut").exists()

    resumed = quick(tiny_llama, lessons, tmp_path / "cut", resume=True, **settings)
    assert (resumed.digest, resumed.kept_step) == (whole.digest, whole.kept_step)
    for file in ("loss.csv", "adapter_model.safetensors"):
        assert (resumed.adapter / file).read_bytes() == (whole.adapter / file).read_bytes(), file


def command(model: Path, data: Path, output: Path, *more: object) -> list[str]:
    flags = ("--max-steps", 40, "--batch-size", 4, "--rank", 4, "--max-length", 64)
    given = ("--model", model, "--data", data, "--output", output, *flags, *more)
    return [sys.executable, "-m", "loradeploy", "train", *map(str, given)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def wait_for(place: Path, name: str, process: subprocess.Popen[str]) -> None:
    """Wait until the directory `place` has a checkpoint `name`."""
    deadline = time.monotonic() + 120
    while not (place / name).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_signal_ends_the_command_with_its_status_and_advice_to_resume(
    tiny_llama: Path, lessons: Path, tmp_path: Path
) -> None:
    line = command(tiny_llama, lessons, tmp_path / "cut", "--max-steps", 4000, "--save-steps", 20)
    with subprocess.Popen(
        line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        wait_for(tmp_path / "cut-checkpoints", "checkpoint-20", process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert (
        err.startswith("interrupted: stopped after step ")
        and "repeat the call with --resume to continue" in err
    )
    assert err.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs that are killed are forks")
def test_runs_killed_at_any_moment_are_resumed_to_the_same_adapter(
    tiny_llama: Path, lessons: Path
) -> None:
    """Killed once at a file operation, once at a random time, once by SIGTERM."""
    given = ["--runs", "3", "--seed", "0", "--model", str(tiny_llama), "--data", str(lessons)]
    done = subprocess.run(
        [sys.executable, "-m", "tools.kill_training", *given],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert (result["runs"], result["findings"]) == (3, [])
    assert [result["kills"][kind] for kind in ("file", "time", "term")] == [1, 1, 1]


def set_gradients(monkeypatch: pytest.MonkeyPatch, step: int, value: float) -> None:
    """Set the gradients of a step to `value`."""
    whole = AdapterTrainer.training_step

    def broken(self: AdapterTrainer, *inputs: Any) -> Any:
        loss = whole(self, *inputs)
        if self.state.global_step + 1 == step:
            next(iter(self._injection.parameters())).grad.fill_(value)
        return loss

    monkeypatch.setattr(AdapterTrainer, "training_step", broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_stop_a_run_and_the_last_good_checkpoint_is_named(
    value: float,
    tiny_llama: Path,
    lessons: Path,
    tmp_path: Path,
    quick: Quick,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_gradients(monkeypatch, 4, value)
    with pytest.raises(TrainingError, match=r"norm is (nan|inf) at step 4: .*checkpoint-3$"):
        quick(tiny_llama, lessons, tmp_path / "adapter", max_steps=6, save_steps=1)
    kept = load_adapter(tmp_path / "adapter-checkpoints" / "checkpoint-3")
    assert kept.parameter_count > 0
    assert not (tmp_path / "adapter").exists()


def test_gradient_checkpointing_gives_the_same_adapter(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    kept = quick(tiny_llama, lessons, tmp_path / "kept")
    again = quick(tiny_llama, lessons, tmp_path / "again", gradient_checkpointing=True)
    assert again.loss_after == pytest.approx(kept.loss_after, abs=tolerance("same-torch"))
    for one, other in zip(
        load_adapter(kept.adapter).factors.values(),
        load_adapter(again.adapter).factors.values(),
        strict=True,
    ):
        assert abs(one.B - other.B).max() <= tolerance("same-torch")


def test_autocast_trains_nearly_the_same_in_bfloat16_and_refuses_fp16_without_a_gpu(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    wide = quick(tiny_llama, lessons, tmp_path / "wide")
    narrow = quick(tiny_llama, lessons, tmp_path / "narrow", autocast="bf16")
    assert narrow.digest != wide.digest
    assert narrow.loss_after == pytest.approx(wide.loss_after, rel=tolerance("bf16-rounding"))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="`autocast` fp16 needs a GPU: use bf16"):
            quick(tiny_llama, lessons, tmp_path / "half", autocast="fp16")


@pytest.mark.breadth(2)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_base_trains_an_adapter_in_full_precision(
    precision: str, tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {"max_steps": 12, "learning_rate": 5e-3}
    wide = quick(tiny_llama, lessons, tmp_path / "wide", **settings)
    packed = quick(tiny_llama, lessons, tmp_path / "packed", precision=precision, **settings)
    assert packed.loss_after < 0.9 * packed.loss_before
    assert packed.loss_before == pytest.approx(wide.loss_before, rel=0.05)
    assert packed.loss_before != wide.loss_before, "nothing was packed"
    assert packed.base_digest == wide.base_digest
    pairs = load_adapter(packed.adapter).factors.values()
    assert {pair.B.dtype.name for pair in pairs} == {"float32"}


def test_with_lora_plus_b_changes_more(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    sizes = {}
    for ratio in (1, 16):
        result = quick(
            tiny_llama,
            lessons,
            tmp_path / str(ratio),
            max_steps=1,
            lora_plus_ratio=ratio,
            warmup_steps=0,
        )
        pairs = load_adapter(result.adapter).factors.values()
        sizes[ratio] = sum(float(abs(pair.B).sum()) for pair in pairs)
    assert sizes[16] == pytest.approx(16 * sizes[1], rel=0.01)


def test_a_missing_tensorboard_is_named(
    tiny_llama: Path,
    lessons: Path,
    tmp_path: Path,
    quick: Quick,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match="pip install tensorboard"):
        quick(tiny_llama, lessons, tmp_path / "adapter", tensorboard=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lessons.jsonl"]


def test_tensorboard_gets_every_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    written = TensorBoard(tmp_path / "events")
    written.close()
    assert list((tmp_path / "events").iterdir())
