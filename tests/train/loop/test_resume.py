"""An interrupted run is resumed to the same adapter, or the refusal says why it cannot be."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loradeploy.adapter import load_adapter
from loradeploy.errors import OutputError, TrainingError, UsageError
from loradeploy.train import job, saving
from loradeploy.train.loop.checkpoints import Checkpoints
from loradeploy.train.loop.trainer import AdapterTrainer
from loradeploy.train.result import TrainResult
from tests.inputs.edits import edited_json
from tests.train.conftest import Quick, train_quickly, write_lessons, write_lines

SETTINGS = {"max_steps": 8, "save_steps": 2, "dropout": 0.1, "warmup_steps": 2}


class Killed(BaseException):
    """Ends a run in the middle."""


@pytest.fixture
def cut(quick: Quick) -> Any:
    """A function that trains like `quick` and is killed after `after` steps."""

    def run(*arguments: Any, after: int, **flags: Any) -> None:
        with killed_after(after):
            quick(*arguments, **flags)

    return run


@contextlib.contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """Within the context, training raises `Killed` in the step after `steps`."""
    counter = itertools.count(1)
    whole = AdapterTrainer.training_step

    def step(*inputs: Any) -> Any:
        if next(counter) > steps:
            raise Killed
        return whole(*inputs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AdapterTrainer, "training_step", step)
        yield


@pytest.mark.breadth(3)
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


@pytest.fixture(scope="module")
def interrupted_once(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run killed after step 5, with checkpoints of steps 2 and 4."""
    place = tmp_path_factory.mktemp("interrupted")
    data = write_lessons(place / "lessons.jsonl")
    with killed_after(5):
        train_quickly(tiny_llama, data, place / "adapter", **SETTINGS)
    return place / "adapter-checkpoints"


@pytest.fixture
def interrupted(interrupted_once: Path, tmp_path: Path) -> Path:
    """A copy of `interrupted_once`; the training data is `lessons`."""
    shutil.copytree(interrupted_once, tmp_path / "adapter-checkpoints")
    return tmp_path / "adapter"


def test_a_checkpoint_is_an_adapter_and_is_removed_at_the_end_of_the_run(
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


def test_an_incomplete_checkpoint_of_a_killed_run_is_skipped(
    interrupted: Path, tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    checkpoints = interrupted.with_name("adapter-checkpoints")
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-6")
    (checkpoints / "checkpoint-6" / "trainer_state.json").write_text('{"global')
    whole = quick(tiny_llama, lessons, tmp_path / "whole", **SETTINGS)
    assert quick(tiny_llama, lessons, interrupted, resume=True, **SETTINGS).digest == whole.digest


def checkpoint_of(output: Path, step: int) -> Path:
    return output.with_name(f"{output.name}-checkpoints") / f"checkpoint-{step}"


def flip(file: Path) -> None:
    """Flip one bit of `file`."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def make_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("optimizer.pt", flip, "other bytes in optimizer.pt"),
        ("adapter_model.safetensors", flip, "other bytes in adapter_model.safetensors"),
        ("scheduler.pt", shorten, "of scheduler.pt"),
        ("rng_state.pth", Path.unlink, "no file rng_state.pth"),
        ("trainer_state.json", make_a_pipe, "no file trainer_state.json"),
        ("checkpoint.json", shorten, "checkpoint.json is not"),
        ("checkpoint.json", Path.unlink, "no checkpoint.json"),
    ],
)
def test_a_damaged_checkpoint_is_not_read_and_the_previous_one_is_used(
    file: str,
    damage: Callable[[Path], None],
    message: str,
    interrupted: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(checkpoint_of(interrupted, 4) / file)
    checkpoints = Checkpoints(interrupted)
    record = json.loads((checkpoints.directory / "run.json").read_text())
    with checkpoints.begun(record, resume=True) as begin:
        assert begin == checkpoint_of(interrupted, 2)
    (reported,) = caplog.messages
    assert "checkpoint-4 is damaged" in reported and message in reported
    assert reported.endswith(f"resuming from {begin}")
    assert "\n" not in reported


def test_a_run_whose_last_checkpoint_is_damaged_ends_at_the_same_adapter(
    interrupted: Path, tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    flip(checkpoint_of(interrupted, 4) / "optimizer.pt")
    whole = quick(tiny_llama, lessons, tmp_path / "whole", **SETTINGS)
    assert quick(tiny_llama, lessons, interrupted, resume=True, **SETTINGS).digest == whole.digest


def test_a_run_with_only_damaged_checkpoints_is_refused_and_they_are_kept(
    interrupted: Path, tiny_llama: Path, lessons: Path, quick: Quick
) -> None:
    for step in (2, 4):
        shorten(checkpoint_of(interrupted, step) / "optimizer.pt")
    with pytest.raises(UsageError, match=r"no checkpoint is intact \(.*checkpoint-4 has .* remove"):
        quick(tiny_llama, lessons, interrupted, resume=True, **SETTINGS)
    assert checkpoint_of(interrupted, 2).is_dir()


def test_a_checkpoint_of_another_run_is_refused_by_name(
    interrupted: Path, tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick, cut: Any
) -> None:
    cut(tiny_llama, lessons, tmp_path / "other", after=7, **{**SETTINGS, "seed": 1})
    shutil.copytree(checkpoint_of(tmp_path / "other", 6), checkpoint_of(interrupted, 6))
    with pytest.raises(UsageError, match=r"checkpoint-6 is not of the run that"):
        quick(tiny_llama, lessons, interrupted, resume=True, **SETTINGS)


class Runs:
    """An object that creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_code_is_refused_and_does_not_run_it(
    file: str, interrupted: Path, tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    place = checkpoint_of(interrupted, 4)
    torch.save({"state": Runs(tmp_path / "trace")}, place / file)
    with edited_json(place / "checkpoint.json") as record:
        content = (place / file).read_bytes()
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        record["files"][file] = {"bytes": len(content), "digest": digest}
    with pytest.raises(UsageError, match=r"checkpoint-4 .* code, .*remove it, and resume") as error:
        quick(tiny_llama, lessons, interrupted, resume=True, **SETTINGS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "trace").exists()


def test_a_run_killed_at_its_end_takes_no_further_step(
    tiny_llama: Path,
    lessons: Path,
    tmp_path: Path,
    quick: Quick,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 3 batches per epoch, so that the last step is in the middle of one."""
    settings = {**SETTINGS, "keep_best": True, "eval_steps": 2, "validation_split": 0.1}
    whole = quick(tiny_llama, lessons, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(job, "save_run", lambda *_: _raise(Killed()))
        quick(tiny_llama, lessons, tmp_path / "cut", **settings)
    monkeypatch.setattr(AdapterTrainer, "training_step", lambda *_: pytest.fail("a step too many"))
    resumed = quick(tiny_llama, lessons, tmp_path / "cut", resume=True, **settings)
    assert (resumed.digest, resumed.steps, resumed.tokens, resumed.kept_step) == (
        *(whole.digest, whole.steps, whole.tokens, whole.kept_step),
    )
    assert (resumed.adapter / "loss.csv").read_bytes() == (whole.adapter / "loss.csv").read_bytes()


def test_a_run_killed_at_early_stopping_does_not_continue(
    tiny_llama: Path,
    lessons: Path,
    tmp_path: Path,
    quick: Quick,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {
        "max_steps": 20,
        "save_steps": 2,
        "eval_steps": 2,
        "early_stopping": 1,
        "validation_split": 0.25,
        "learning_rate": 8.0,
        "warmup_steps": 0,
    }
    whole = quick(tiny_llama, lessons, tmp_path / "whole", **settings)
    assert whole.steps < 20
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(job, "save_run", lambda *_: _raise(Killed()))
        quick(tiny_llama, lessons, tmp_path / "cut", **settings)
    resumed = quick(tiny_llama, lessons, tmp_path / "cut", resume=True, **settings)
    assert (resumed.digest, resumed.steps) == (whole.digest, whole.steps)


def _raise(problem: BaseException) -> None:
    raise problem


def test_two_concurrent_runs_with_one_output_are_refused(
    interrupted: Path, tiny_llama: Path, lessons: Path, quick: Quick
) -> None:
    checkpoints = Checkpoints(interrupted)
    record = json.loads((checkpoints.directory / "run.json").read_text())
    with checkpoints.begun(record, resume=True):
        for resume in (True, False):
            with pytest.raises(UsageError, match="another process is writing in .*-checkpoints"):
                quick(tiny_llama, lessons, interrupted, resume=resume, **SETTINGS)
    assert quick(tiny_llama, lessons, interrupted, resume=True, **SETTINGS).steps == 8


def test_checkpoints_can_be_on_another_disk_behind_a_link(
    interrupted: Path, tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    place = Checkpoints(interrupted).directory
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    assert quick(tiny_llama, lessons, interrupted, resume=True, **SETTINGS).steps == 8
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_checkpoints_of_another_version_are_refused(
    interrupted: Path, tiny_llama: Path, lessons: Path, quick: Quick
) -> None:
    file = Checkpoints(interrupted).directory / "run.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({n: v for n, v in record.items() if n != "processes"}))
    with pytest.raises(UsageError, match=r"run.json was written by another version"):
        quick(tiny_llama, lessons, interrupted, resume=True, **SETTINGS)


def test_other_files_in_a_checkpoint_are_kept_when_it_is_removed(
    interrupted: Path, tiny_llama: Path, lessons: Path, quick: Quick
) -> None:
    notes = checkpoint_of(interrupted, 4) / "notes.txt"
    notes.write_text("mine")
    quick(tiny_llama, lessons, interrupted, resume=True, **SETTINGS)
    assert [path.name for path in notes.parent.parent.glob("**/*")] == ["checkpoint-4", "notes.txt"]


def test_resuming_needs_the_same_number_of_processes_and_the_same_config(
    interrupted: Path,
    tiny_llama: Path,
    lessons: Path,
    tmp_path: Path,
    quick: Quick,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(job, "process_count", lambda: 2)
        with pytest.raises(UsageError, match="processes was 1 and is 2"):
            quick(tiny_llama, lessons, interrupted, resume=True, **SETTINGS)
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(UsageError, match="base_config was "):
        quick(other, lessons, interrupted, resume=True, **SETTINGS)


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES"])
def test_an_error_while_a_checkpoint_is_written_names_it_and_keeps_the_last_one(
    name: str, interrupted: Path
) -> None:
    number = getattr(errno, name)
    checkpoints = Checkpoints(interrupted)
    with pytest.raises(OutputError) as error, checkpoints.writing(6, {}) as place:
        (place / "optimizer.pt").write_bytes(b"half")
        raise OSError(number, os.strerror(number), str(place / "optimizer.pt"))
    target = checkpoint_of(interrupted, 6)
    assert str(error.value).startswith(f"{target} cannot be written: {os.strerror(number)}")
    assert (error.value.errno, error.value.filename) == (number, str(target))
    assert checkpoints.newest() == checkpoint_of(interrupted, 4)
    left = sorted(path.name for path in target.parent.iterdir())
    assert left == ["checkpoint-2", "checkpoint-4", "run.json"]


@pytest.mark.parametrize("place", ["checkpoint-4", "adapter"])
def test_a_run_ended_by_a_full_disk_reports_how_to_continue(
    place: str,
    tiny_llama: Path,
    lessons: Path,
    tmp_path: Path,
    quick: Quick,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {**SETTINGS, "max_steps": 4, "save_steps": 2}
    written, reason = torch.save, os.strerror(errno.ENOSPC)

    def save(value: Any, file: Any, *rest: Any) -> None:
        if place in str(file).removeprefix(str(tmp_path / "adapter")) and "optimizer" in str(file):
            raise OSError(errno.ENOSPC, reason)
        written(value, file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        if place == "adapter":
            patch.setattr(saving, "write_curve", lambda *_: _raise(OSError(errno.ENOSPC, reason)))
        with pytest.raises(TrainingError) as error:
            quick(tiny_llama, lessons, tmp_path / "adapter", **settings)
    message = str(error.value)
    unwritten = tmp_path / "adapter"
    last = checkpoint_of(unwritten, 4)
    if place == "checkpoint-4":
        unwritten, last = last, checkpoint_of(unwritten, 2)
    assert message.startswith(f"{unwritten} cannot be written: {reason}: free some space there, ")
    assert message.endswith(f"; {last} is intact: continue from it with `resume`")
    assert "\n" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-checkpoints", lessons.name]
    assert quick(tiny_llama, lessons, tmp_path / "adapter", resume=True, **settings).steps == 4


def test_an_unfinished_run_is_not_overwritten_by_a_new_one(
    interrupted: Path, tiny_llama: Path, lessons: Path, quick: Quick
) -> None:
    with pytest.raises(UsageError, match="checkpoint-4 is from a run that did not finish"):
        quick(tiny_llama, lessons, interrupted, **SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, "rank was 4 and is 8"),
        ({"max_steps": None}, "max_steps was 8 and is 0"),  # not set, as earlier versions wrote it
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


def test_the_checkpoint_interval_can_change(
    interrupted: Path, tiny_llama: Path, lessons: Path, quick: Quick
) -> None:
    result: TrainResult = quick(
        tiny_llama, lessons, interrupted, resume=True, **{**SETTINGS, "save_steps": 3}
    )
    assert result.steps == 8


def test_resuming_without_a_checkpoint_is_reported(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    with pytest.raises(UsageError, match="nothing to resume in .*adapter-checkpoints"):
        quick(tiny_llama, lessons, tmp_path / "adapter", resume=True)


def test_remains_of_a_run_killed_at_its_very_end_are_removed(
    interrupted: Path, tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    for step in (2, 4):
        shutil.rmtree(checkpoint_of(interrupted, step))
    with pytest.raises(UsageError, match="nothing to resume in .*adapter-checkpoints"):
        quick(tiny_llama, lessons, interrupted, resume=True, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == [lessons.name]


def test_other_files_beside_the_checkpoints_are_kept(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    notes = tmp_path / "adapter-checkpoints" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    quick(tiny_llama, lessons, tmp_path / "adapter", **SETTINGS)
    assert [path.name for path in notes.parent.iterdir()] == ["notes.txt"]
