"""A run that was cut off goes on to the same adapter, or says why it cannot."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

from loradeploy.adapter import load_adapter
from loradeploy.errors import UsageError
from loradeploy.train.api import TrainResult
from loradeploy.train.trainer import AdapterTrainer
from tests.train.conftest import Quick, write_lines

SETTINGS = {"max_steps": 8, "save_steps": 2, "dropout": 0.1, "warmup_steps": 2}


class Killed(BaseException):
    """What ends a run in the middle."""


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch, quick: Quick) -> Any:
    """A function that trains as `quick` does and is killed after a number of steps."""

    def run(*arguments: Any, after: int, **flags: Any) -> None:
        counter = itertools.count(1)
        whole = AdapterTrainer.training_step

        def step(*inputs: Any) -> Any:
            if next(counter) > after:
                raise Killed
            return whole(*inputs)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(AdapterTrainer, "training_step", step)
            quick(*arguments, **flags)

    return run


@pytest.mark.parametrize("after", [2, 5, 7])
def test_a_resumed_run_ends_at_the_same_adapter_and_curve(
    after: int, tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick, cut: Any
) -> None:
    whole = quick(tiny_llama, lessons, tmp_path / "whole", **SETTINGS)
    cut(tiny_llama, lessons, tmp_path / "cut", after=after, **SETTINGS)
    assert not (tmp_path / "cut").exists()
    resumed = quick(tiny_llama, lessons, tmp_path / "cut", resume=True, **SETTINGS)
    assert resumed.digest == whole.digest
    same = ("steps", "tokens", "loss_before", "loss_after")
    assert [getattr(resumed, name) for name in same] == [getattr(whole, name) for name in same]
    for file in ("loss.csv", "loss.png", "train.yaml", "adapter_model.safetensors"):
        assert (resumed.adapter / file).read_bytes() == (whole.adapter / file).read_bytes(), file


def test_a_classifier_is_resumed_with_its_head(
    tiny_bert: Path, topics: Path, tmp_path: Path, quick: Quick, cut: Any
) -> None:
    settings = {**SETTINGS, "task": "sequence-classification"}
    whole = quick(tiny_bert, topics, tmp_path / "whole", **settings)
    cut(tiny_bert, topics, tmp_path / "cut", after=5, **settings)
    resumed = quick(tiny_bert, topics, tmp_path / "cut", resume=True, **settings)
    assert resumed.digest == whole.digest


@pytest.fixture
def interrupted(tiny_llama: Path, lessons: Path, tmp_path: Path, cut: Any) -> Path:
    """The output of a run that was killed after step 5; checkpoints of steps 2 and 4 are left."""
    cut(tiny_llama, lessons, tmp_path / "adapter", after=5, **SETTINGS)
    return tmp_path / "adapter"


def test_a_checkpoint_is_an_adapter_and_goes_when_the_run_is_done(
    interrupted: Path, tiny_llama: Path, lessons: Path, quick: Quick
) -> None:
    checkpoints = interrupted.with_name("adapter-checkpoints")
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "run.json",
    ]
    earlier = load_adapter(checkpoints / "checkpoint-4")
    result = quick(tiny_llama, lessons, interrupted, resume=True, **SETTINGS)
    assert earlier.base_digest == result.base_digest
    assert earlier.digest != result.digest
    assert not checkpoints.exists()


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(
    interrupted: Path, tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    checkpoints = interrupted.with_name("adapter-checkpoints")
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-6")
    (checkpoints / "checkpoint-6" / "trainer_state.json").write_text('{"global')
    whole = quick(tiny_llama, lessons, tmp_path / "whole", **SETTINGS)
    assert quick(tiny_llama, lessons, interrupted, resume=True, **SETTINGS).digest == whole.digest


def test_an_unfinished_run_is_not_lost_to_a_fresh_one(
    interrupted: Path, tiny_llama: Path, lessons: Path, quick: Quick
) -> None:
    with pytest.raises(UsageError, match="checkpoint-4 is left of a run that did not finish"):
        quick(tiny_llama, lessons, interrupted, **SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, "rank was 4 and is 8"),
        ({"seed": 1, "learning_rate": 1e-3}, "learning_rate was 0.0005 .*; seed was 0 and is 1"),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(
    change: dict[str, Any],
    message: str,
    interrupted: Path,
    tiny_llama: Path,
    lessons: Path,
    quick: Quick,
) -> None:
    with pytest.raises(UsageError, match=message):
        quick(tiny_llama, lessons, interrupted, resume=True, **{**SETTINGS, **change})


def test_a_run_on_other_data_or_another_base_is_not_resumed(
    interrupted: Path, tiny_llama: Path, tiny_gpt2: Path, lessons: Path, quick: Quick
) -> None:
    with pytest.raises(UsageError, match="base was 'sha256:"):
        quick(tiny_gpt2, lessons, interrupted, resume=True, **SETTINGS)
    write_lines(lessons, [{"text": "other"}] * 12)
    with pytest.raises(UsageError, match="cannot be resumed: data was"):
        quick(tiny_llama, lessons, interrupted, resume=True, **SETTINGS)


def test_how_often_checkpoints_are_written_may_change(
    interrupted: Path, tiny_llama: Path, lessons: Path, quick: Quick
) -> None:
    result: TrainResult = quick(
        tiny_llama, lessons, interrupted, resume=True, **{**SETTINGS, "save_steps": 3}
    )
    assert result.steps == 8


def test_nothing_to_resume_is_told(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    with pytest.raises(UsageError, match="nothing to resume in .*adapter-checkpoints"):
        quick(tiny_llama, lessons, tmp_path / "adapter", resume=True)


def test_what_others_put_beside_the_checkpoints_stays(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    notes = tmp_path / "adapter-checkpoints" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    quick(tiny_llama, lessons, tmp_path / "adapter", **SETTINGS)
    assert [path.name for path in notes.parent.iterdir()] == ["notes.txt"]
