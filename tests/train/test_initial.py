"""`init_adapter`: training continues from an existing adapter; contradictions are refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from loradeploy.adapter import Adapter, load_adapter, save_adapter
from loradeploy.errors import LoraDeployError, UsageError
from loradeploy.train.api import train
from loradeploy.train.config import TrainConfig
from loradeploy.train.config_file import read_config, to_yaml
from loradeploy.train.result import TrainResult
from tests.conftest import MakeAdapter

SHORT = {"max_steps": 4, "batch_size": 4, "max_length": 64, "learning_rate": 5e-3}
CLASSES = {**SHORT, "task": "sequence-classification"}


def goes_on(model: Path, data: Path, output: Path, adapter: Path, **settings: Any) -> TrainResult:
    return train(model, data, output, init_adapter=str(adapter), **{**SHORT, **settings})


def test_training_continues_from_the_adapter(
    tiny_llama: Path, lessons: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    first = train(
        tiny_llama, lessons, tmp_path / "a", rank=3, alpha=11, target_modules="q_proj", **SHORT
    )
    second = goes_on(tiny_llama, lessons, tmp_path / "b", first.adapter)
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-6)
    assert second.loss_before != pytest.approx(first.loss_before, rel=1e-3), "it began anew"
    assert second.loss_after < second.loss_before
    before, after = (load_adapter(result.adapter) for result in (first, second))
    assert (after.config.r, after.config.lora_alpha) == (3, 11)
    assert after.modules == before.modules
    assert after.digest != before.digest
    again = goes_on(tiny_llama, lessons, tmp_path / "c", first.adapter)
    assert again.digest == second.digest

    # An adapter trained by PEFT has no base digest and no labels.
    theirs = make_adapter(tiny_llama, r=5, use_rslora=True, use_dora=True)
    third = load_adapter(goes_on(tiny_llama, lessons, tmp_path / "d", theirs).adapter)
    assert (third.config.r, third.config.use_rslora, third.config.use_dora) == (5, True, True)


def test_biases_of_factors_are_trained_further(
    tiny_llama: Path, lessons: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    theirs = make_adapter(tiny_llama, lora_bias=True, target_modules=["q_proj", "down_proj"])
    result = goes_on(tiny_llama, lessons, tmp_path / "a", theirs)
    assert result.loss_after < result.loss_before
    before, after = (load_adapter(each) for each in (theirs, result.adapter))
    assert after.config.lora_bias
    for module, pair in before.factors.items():
        assert pair.bias is not None
        moved = abs(after.factors[module].bias - pair.bias)
        assert 0 < moved.max() < abs(pair.bias).max(), f"{module}: trained from another start"


def test_a_classifier_keeps_its_head(tiny_bert: Path, topics: Path, tmp_path: Path) -> None:
    first = train(tiny_bert, topics, tmp_path / "a", **CLASSES)
    second = goes_on(tiny_bert, topics, tmp_path / "b", first.adapter, **CLASSES)
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-6)
    assert load_adapter(second.adapter).labels == ("business", "sports", "tech")

    shutil.move(topics / "tech", topics / "art")
    with pytest.raises(UsageError, match="labels are business, sports, tech, .*art, business"):
        goes_on(tiny_bert, topics, tmp_path / "c", first.adapter, **CLASSES)


@pytest.mark.parametrize(
    "setting",
    [
        {"rank": 8},
        {"alpha": 3},
        {"target_modules": "q_proj"},
        {"use_dora": True},
        {"init": "olora"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_defined_by_the_adapter_is_refused(
    setting: dict[str, Any], tmp_path: Path
) -> None:
    (name,) = setting
    with pytest.raises(UsageError, match=f"`{name}` cannot be set with `init_adapter`"):
        goes_on(tmp_path, tmp_path, tmp_path / "o", tmp_path, **setting)


@pytest.mark.parametrize("flags", [{}, {"init_adapter": "a"}], ids=["in the file", "a flag"])
def test_settings_defined_by_the_adapter_are_refused_in_the_file_too(flags: dict[str, Any]) -> None:
    values = {"rank": TrainConfig().rank, "alpha": 16, "seed": 0}  # a rank equal to the default
    if not flags:
        values["init_adapter"] = "a"
    with pytest.raises(UsageError, match="`rank`, `alpha` cannot be set with `init_adapter`"):
        read_config(values, flags)


def test_the_written_settings_of_a_continued_run_can_be_read() -> None:
    config = TrainConfig(init_adapter="a", seed=3)
    text = to_yaml(config)
    assert "\nrank:" not in text
    assert read_config(yaml.safe_load(text)) == config
    assert read_config(yaml.safe_load(to_yaml(TrainConfig()))) == TrainConfig()


def of(**changes: Any) -> Callable[[Adapter], Adapter]:
    return lambda adapter: dataclasses.replace(
        adapter,
        **{
            name: dataclasses.replace(adapter.config, **value) if name == "config" else value
            for name, value in changes.items()
        },
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of(base_digest="sha256:00"), "it was trained on another base"),
        (of(config={"task_type": "SEQ_CLS"}), "task_type is SEQ_CLS, the task causal-lm"),
        (of(config={"init_lora_weights": "pissa"}), "convert it to standard LoRA first"),
    ],
    ids=["base", "task", "a changed base"],
)
def test_an_adapter_of_another_run_is_refused(
    change: Callable[[Adapter], Adapter],
    message: str,
    tiny_llama: Path,
    lessons: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    other = tmp_path / "other"
    save_adapter(change(load_adapter(make_adapter(tiny_llama))), other)
    with pytest.raises(LoraDeployError, match=message):
        goes_on(tiny_llama, lessons, tmp_path / "o", other)
    assert not (tmp_path / "o").exists()
