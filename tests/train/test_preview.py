"""Previews of training data and settings before a run, and the model card after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from loradeploy.train.config import TrainConfig
from loradeploy.train.config_file import read_config
from tests.cli.calling import exit_status
from tests.train.conftest import Quick


def test_a_dry_run_shows_three_examples_with_marked_loss_tokens(
    tiny_llama: Path, lessons: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ("train", "--model", tiny_llama, "--data", lessons, "--dry-run", "--epochs", 2)
    assert exit_status(*given) == 0
    out, err = capfd.readouterr()
    assert err == ""
    examples = out.split("\n\n")[1:]
    assert len(examples) == 3
    for example in examples:
        assert "Question" in example.partition("⟦")[0], "the loss leaves the prompt out"
        assert " answer" in example.partition("⟦")[2].partition("⟧")[0]
    assert exit_status(*given, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["examples"], found["steps"], found["truncated"]) == (12, 4, 0)
    assert 0 < found["learned"] < found["tokens"]
    assert len(found["shown"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lessons.jsonl"]


def test_a_classifiers_examples_are_shown_with_their_labels(
    tiny_bert: Path, topics: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ("--model", tiny_bert, "--data", topics, "--task", "sequence-classification")
    assert exit_status("train", *given, "--dry-run", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["labels"] == ["business", "sports", "tech"]
    assert {example["label"] for example in found["shown"]} <= set(found["labels"])


def test_the_printed_settings_are_a_valid_settings_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--rank", 16, "--rank-pattern", "q_proj=4,up_proj=8", "--columns", "prompt=question")
    assert exit_status("train", "--model", "base", *flags, "--print-config") == 0
    text = capfd.readouterr().out
    assert text.startswith('model: "base"\n')
    assert "# Rank r of the factors A and B.\nrank: 16\n" in text
    file = tmp_path / "train.yaml"
    file.write_text(text)
    config = read_config(file)
    assert config.pattern("rank_pattern") == {"q_proj": 4, "up_proj": 8}
    assert config.column_names == {"prompt": "question"}
    assert exit_status("train", "--config", file, "--print-config") == 0
    assert capfd.readouterr().out == text


def test_model_data_and_output_can_be_in_the_file(
    tiny_llama: Path, lessons: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.yaml"
    paths = {"model": str(tiny_llama), "data": str(lessons), "output": str(tmp_path / "adapter")}
    file.write_text(yaml.safe_dump({**paths, "max_steps": 1, "max_length": 64, "batch_size": 4}))
    assert exit_status("train", "--config", file, "--json") == 0
    assert json.loads(capfd.readouterr().out)["adapter"] == paths["output"]
    file.write_text(yaml.safe_dump({"model": str(tiny_llama)}))
    assert exit_status("train", "--config", file) == 2
    assert "give --data, or data in the file of --config" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("init: loftq", "`init` is 'loftq': give kaiming, gaussian, pissa, olora or pissa_niter_N"),
        ("rank_pattern: q_proj", "`rank_pattern` is 'q_proj': give NAME=8,NAME=4"),
        ("rank_pattern: q_proj=2.5", "`rank_pattern` has 2.5 for q_proj: give a whole number"),
        ("rank_pattern: q_proj=nan", "`rank_pattern` has nan for q_proj: give a whole number"),
        ("rank_pattern: q_proj=0", "`rank_pattern` has 0 for q_proj: give a whole number from 1"),
        ("alpha_pattern: q_proj=inf", "`alpha_pattern` has inf for q_proj: give a value from 0"),
        ("layers_to_transform: first", "`layers_to_transform` is 'first': give whole numbers"),
        ("alpha_pattern: q_proj=0", "`alpha_pattern` has 0 for q_proj, with which the adapter has"),
        ("alpha: 0", "`alpha` is 0, with which the adapter has no effect"),
        ("learning_rate: 0", "`learning_rate` is 0, with which the adapter has no effect"),
        ("max_steps: 0", "`max_steps` is 0, which trains nothing: leave it out to train for `ep"),
        ("max_steps: -1", "`max_steps` is -1: give a value from 1"),
        ("max_steps: 2.5", "`max_steps` is 2.5: give a value of type int$"),
        ("rank: null", "`rank` is None: give a value of type int"),
        ("layers_to_transform: [1]", "`layers_to_transform` needs a list of names in"),
        ("columns: prompt", "`columns` is 'prompt': give NAME=COLUMN"),
        (
            "validation: a\nvalidation_split: 0.1",
            "`validation` and `validation_split` exclude each other",
        ),
        ("bias: some", "`bias` is 'some': give one of none, all, lora_only"),
        ("lora_plus_ratio: 0.5", "`lora_plus_ratio` is 0.5: give a value from 1"),
    ],
)
def test_an_invalid_setting_is_named(settings: str, message: str, tmp_path: Path) -> None:
    from loradeploy.errors import UsageError

    file = tmp_path / "train.yaml"
    file.write_text(settings)
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        read_config(file)


def test_every_setting_can_be_written_and_read(tmp_path: Path) -> None:
    from loradeploy.train.config_file import to_yaml

    file = tmp_path / "train.yaml"
    config = TrainConfig(rank=3, rank_pattern="a=4", target_modules="re:.*q_proj", use_dora=True)
    file.write_text(to_yaml(config))
    assert read_config(file) == config


def test_an_adapter_has_a_card_that_the_hub_reads(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    result = quick(tiny_llama, lessons, tmp_path / "adapter", use_dora=True)
    text = (result.adapter / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": str(tiny_llama),
        "library_name": "peft",
        "tags": ["loradeploy", "lora", "causal-lm"],
    }
    for fact in (result.digest, result.base_digest, "12 examples", "| method | DoRA |"):
        assert fact in body
    assert f"{result.loss_before:.4f} → {result.loss_after:.4f}" in body
    assert "transformers " in body
