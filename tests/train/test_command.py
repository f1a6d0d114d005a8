"""`loradeploy train`: settings by flags and files, results on stdout, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loradeploy.adapter import load_adapter
from loradeploy.train.config_file import read_config
from tests.cli.calling import exit_status

SHORT = ("--max-steps", 2, "--batch-size", 4, "--max-length", 64)


def test_flags_and_file_reach_the_adapter_and_the_result_is_json(
    tiny_llama: Path, lessons: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "train.yaml"
    settings.write_text("rank: 2\nalpha: 6\nuse_rslora: true\ntarget_modules: [q_proj]\n")
    place = tmp_path / "adapter"
    model = ("--model", tiny_llama, "--data", lessons, "--output", place)
    status = exit_status(
        "train", *model, *SHORT, "--config", settings, "--rank", 3, "--no-use-rslora", "--json"
    )
    out, err = capfd.readouterr()
    assert (status, err) == (0, ""), "progress is for terminals"
    result = json.loads(out)
    adapter = load_adapter(place)
    assert result["adapter"] == str(place)
    assert result["digest"] == adapter.digest
    assert result["loss_after"] != result["loss_before"]
    assert (adapter.config.r, adapter.config.lora_alpha, adapter.config.use_rslora) == (3, 6, False)
    assert adapter.config.target_modules == ("q_proj",)
    assert read_config(place / "train.yaml").max_steps == 2


def test_a_classifier_is_trained_from_class_folders(
    tiny_bert: Path, topics: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "adapter"
    model = ("--model", tiny_bert, "--data", topics, "--output", place)
    assert exit_status("train", *model, *SHORT, "--task", "sequence-classification") == 0
    out, err = capfd.readouterr()
    assert "accuracy after" in out
    assert err == ""
    assert load_adapter(place).labels == ("business", "sports", "tech")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--data", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("--model", "./nowhere"), "nowhere does not exist: give a Hugging Face model directory"),
        (("--model", __file__), "test_command.py is not a directory: give a Hugging Face model"),
        (("--rank", "0"), "rank is 0"),
        (("--target-modules", "nothing"), "its linear layers end in: down_proj"),
        (("--config", "nowhere.yaml"), "nowhere.yaml does not exist"),
        (("--resume",), "nothing to resume"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    changed: tuple[str, ...],
    message: str,
    tiny_llama: Path,
    lessons: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.iterdir())
    model = ("--model", tiny_llama, "--data", lessons, "--output", tmp_path / "adapter")
    assert exit_status("train", *model, *SHORT, *changed) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
