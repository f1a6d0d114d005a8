"""Training settings from a file and from flags."""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from loradeploy.errors import UsageError
from loradeploy.train.config import OF_PATHS, TrainConfig
from loradeploy.train.config_file import read_config, to_yaml
from loradeploy.train.flags import TrainFlags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 4", r"unknown setting 'rnak': did you mean rank\?"),
        ("learning-rate: 1e-4", r"did you mean learning_rate\?"),
        ("zzz: 4", "unknown setting 'zzz': the settings are task, problem_type"),
        ("rank: four", "`rank` is 'four': give a value of type int"),
        ("rank: 4.5", "`rank` is 4.5: give a value of type int"),
        ("rank: 0", "`rank` is 0: give a value from 1 to 4096"),
        ("rank: true", "`rank` is True"),
        ("learning_rate: .nan", "`learning_rate` is nan"),
        ("use_rslora: 1", "`use_rslora` is 1"),
        ("schedule: wavy", "`schedule` is 'wavy': give one of linear, cosine, constant"),
        ("task: poetry", "`task` is 'poetry'"),
        ("target_modules: ','", "`target_modules` is empty"),
        ("target_modules: []", "`target_modules` is empty"),
        ("problem_type: ranking", "`problem_type` is 'ranking': give one of single-label"),
        (
            "task: token-classification\nproblem_type: multi-label",
            "`problem_type` is 'multi-label', which is for sequence-classification",
        ),
        ("rank: 4\nseed: 1\nrank: 8", "the key 'rank' is given 2 times"),
        ("rank: 4\nrank: 4", "the key 'rank' is given 2 times"),
        ("rank: 010", "`rank` is '010': give a value of type int"),
        ("rank: 1:20", "`rank` is '1:20': give a value of type int"),
        ("rank: 1_6", "`rank` is '1_6'"),
        ("rank: " + "9" * 400, "`rank` is 9+…9+: give a value from 1 to 4096"),
        ("rank: " + "9" * 5000, "is not valid YAML"),
        ("learning_rate: " + "9" * 400, "`learning_rate` is 9+…9+: give a value of type float"),
        ("rank: .inf", "`rank` is inf: give a value of type int"),
        ("rank: 2020-99-99", "is not valid YAML: month must be in 1..12"),
        ("1: 2", "unknown setting 1"),
        ("null: 2", "unknown setting None"),
        ("? [a]\n: 2", "is not valid YAML"),
        ("a: " + "[" * 3000, "is not valid YAML"),
        ("rank: &a [*a]", "`rank` is"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML: could not determine a constr"),
        ("- rank", "has no settings"),
        ("", "has no settings"),
        ("rank: [", "is not valid YAML"),
    ],
)
def test_an_invalid_setting_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_config(tmp_path / "train.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.yaml does not exist"):
        read_config(tmp_path / "nowhere.yaml")


def test_flags_take_precedence_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("rank: 4\nlearning_rate: 1e-4\n")
    config = read_config(tmp_path / "train.yaml", {"rank": 16})
    assert (config.rank, config.learning_rate) == (16, 1e-4)


def test_written_settings_are_read_back_unchanged(tmp_path: Path) -> None:
    config = TrainConfig(rank=3, target_modules="q_proj,v_proj", learning_rate=1e-7)
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    assert read_config(file) == config


@pytest.mark.parametrize(
    ("written", "targets"),
    [
        ("all-linear", "all-linear"),
        ("v_proj, q_proj", ("q_proj", "v_proj")),
        ("[v_proj, q_proj]", ("q_proj", "v_proj")),
        (r"re:.*\.0\..*", r".*\.0\..*"),
    ],
)
def test_targets_can_be_a_word_a_list_or_a_pattern(
    written: str, targets: str | tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "train.yaml").write_text(f"target_modules: {written}\n")
    assert read_config(tmp_path / "train.yaml").targets == targets


def test_every_setting_of_train_is_typed() -> None:
    settings = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    assert TrainFlags.__annotations__.keys() == settings.keys()
    known = typing.get_type_hints(TrainFlags)
    paths = dict.fromkeys(OF_PATHS, str | os.PathLike[str])  # stored as a text
    assert known == {**typing.get_type_hints(TrainConfig), **paths}


@pytest.mark.parametrize("name", OF_PATHS)
def test_a_path_is_stored_as_a_text(name: str, tmp_path: Path) -> None:
    for made in (
        TrainConfig(**{name: tmp_path}),
        read_config(None, {name: tmp_path}),
        read_config({name: tmp_path}),
    ):
        assert getattr(made, name) == str(tmp_path)
        assert f"{name}: {tmp_path}" in to_yaml(made)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("rank", "8", "int"), ("rank", True, "int"), ("task", None, "str"), ("alpha", None, "float")],
)
def test_a_value_of_another_type_is_refused_by_name(name: str, value: Any, kind: str) -> None:
    with pytest.raises(UsageError, match=f"`{name}` is .*: give a value of type {kind}"):
        TrainConfig(**{name: value})


def test_a_config_of_another_type_is_refused() -> None:
    with pytest.raises(UsageError, match="`config` is 5: give a YAML file or a mapping"):
        read_config(5)  # type: ignore[arg-type]
