"""Training lowers the loss, is deterministic, and writes adapters that PEFT reads."""

from __future__ import annotations

import csv
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loradeploy.adapter import base_digest, load_adapter
from loradeploy.errors import DataError, ModelError, TrainingError, UsageError
from loradeploy.lora.inject import load
from loradeploy.train import job, prepared, saving
from loradeploy.train.config import TrainConfig
from loradeploy.train.config_file import read_config
from loradeploy.train.data.examples import read_conversations
from loradeploy.train.data.features import Collator, conversation_features
from loradeploy.train.data.sources import Source
from loradeploy.train.loop.trainer import AdapterTrainer, evaluation_batches
from loradeploy.train.model import open_checkpoint
from tests.tolerances import tolerance
from tests.train.conftest import Quick


def test_training_lowers_the_loss_and_writes_all_documented_files(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    result = quick(
        tiny_llama, lessons, tmp_path / "adapter", max_steps=20, learning_rate=5e-3, max_length=900
    )
    assert (result.steps, result.examples, result.truncated) == (20, 12, 0)
    assert result.evaluated_on == "training"
    assert result.loss_after < 0.8 * result.loss_before
    assert {file.name for file in result.adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.csv",
        "loss.png",
        "train.yaml",
    }
    curve = list(csv.DictReader((result.adapter / "loss.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in curve] == list(range(1, 21))
    assert float(curve[-1]["loss"]) < float(curve[0]["loss"])
    assert (result.adapter / "loss.png").read_bytes().startswith(b"\x89PNG")
    settings = read_config(result.adapter / "train.yaml")
    assert settings.max_steps == 20
    assert settings.max_length == 128, "the model takes no more"
    adapter = load_adapter(result.adapter)
    assert adapter.digest == result.digest
    assert adapter.base_digest == base_digest(tiny_llama) == result.base_digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "lessons.jsonl"]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_peft_computes_the_loss_that_training_reports(
    model: str, lessons: Path, tmp_path: Path, quick: Quick, request: pytest.FixtureRequest
) -> None:
    import peft

    directory = request.getfixturevalue(model)
    result = quick(directory, lessons, tmp_path / "adapter", learning_rate=5e-3)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    base = AutoModelForCausalLM.from_pretrained(directory).eval()
    adapted = peft.PeftModel.from_pretrained(base, result.adapter).eval()
    encoded = conversation_features(read_conversations(Source(lessons)), tokenizer, 64)
    batch = Collator(tokenizer.pad_token_id)(encoded.features)
    with torch.no_grad():
        theirs = float(adapted(**batch).loss)
        base_loss = float(adapted.unload()(**batch).loss)
    assert theirs == pytest.approx(result.loss_after, abs=tolerance("same-torch") * 10)
    assert base_loss == pytest.approx(result.loss_before, abs=tolerance("same-torch") * 10)
    assert abs(base_loss - theirs) > 0.01, "the adapter did nothing"


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["fused", "with-dropout"])
def test_the_same_seed_gives_the_same_adapter_bit_for_bit(
    dropout: float, tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    one, same, other = (
        quick(tiny_llama, lessons, tmp_path / name, seed=seed, dropout=dropout)
        for name, seed in (("one", 3), ("same", 3), ("other", 4))
    )
    assert one.digest == same.digest != other.digest
    for file in ("adapter_model.safetensors", "adapter_config.json", "loss.csv", "loss.png"):
        assert (one.adapter / file).read_bytes() == (same.adapter / file).read_bytes()


def test_a_classifier_learns_its_labels(
    tiny_bert: Path, topics: Path, tmp_path: Path, quick: Quick
) -> None:
    result = quick(
        tiny_bert,
        topics,
        tmp_path / "adapter",
        task="sequence-classification",
        max_steps=40,
        learning_rate=1e-2,
        batch_size=8,
    )
    adapter = load_adapter(result.adapter)
    assert adapter.labels == ("business", "sports", "tech")
    assert set(adapter.saved) == {"classifier.weight", "classifier.bias"}
    assert result.loss_after < 0.5 * result.loss_before
    assert result.accuracy_before is not None
    assert result.accuracy_after is not None
    assert result.accuracy_before < 0.7 < 0.9 < result.accuracy_after


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({}, "lessons"),
        ({"task": "sequence-classification"}, "topics"),
    ],
    ids=["causal-lm", "sequence-classification"],
)
def test_accumulated_batches_train_the_same_as_one_large_batch(
    settings: dict[str, Any],
    data: str,
    tiny_llama: Path,
    tmp_path: Path,
    quick: Quick,
    request: pytest.FixtureRequest,
) -> None:
    directory = request.getfixturevalue(data)
    # Without clipping, a gradient that is too large by a factor would be detected.
    settings = {**settings, "max_steps": 2, "max_grad_norm": 1e9, "weight_decay": 0.0}
    whole = quick(tiny_llama, directory, tmp_path / "whole", batch_size=8, **settings)
    parts = quick(
        tiny_llama,
        directory,
        tmp_path / "parts",
        batch_size=2,
        gradient_accumulation=4,
        **settings,
    )
    norms = [
        [
            float(row["grad_norm"])
            for row in csv.DictReader((result.adapter / "loss.csv").read_text().splitlines())
        ]
        for result in (whole, parts)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert parts.loss_after == pytest.approx(whole.loss_after, rel=1e-3)


def test_a_validation_split_is_evaluated_and_not_trained_on(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    result = quick(tiny_llama, lessons, tmp_path / "a", validation_split=0.25, max_steps=None)
    assert (result.examples, result.evaluated_on) == (9, "validation")
    assert result.steps == 3, "9 examples in batches of 4"
    with pytest.raises(
        DataError, match=r"has 12 examples: with `validation_split` 0.01 none is left to"
    ):
        quick(tiny_llama, lessons, tmp_path / "b", validation_split=0.01)


@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": "q_porj=2"},
        {"alpha_pattern": "lm_head=2"},
        {"rank_pattern": "q_proj=2,layers.0.self_attn.q_proj=3"},
    ],
    ids=["misspelled", "not-a-target", "shadowed"],
)
def test_a_pattern_that_applies_to_no_target_is_refused(
    patterns: dict[str, str], tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    with pytest.raises(UsageError, match="pattern: .*applies to none of the target modules"):
        quick(tiny_llama, lessons, tmp_path / "a", **patterns)


@pytest.mark.parametrize(
    ("lengths", "count"),
    [([10] * 40, 32), ([512] * 40, 8), ([9000, 10], 1), ([10, 20], 2)],
    ids=["short", "long", "one-longer-than-the-limit", "few"],
)
def test_without_evaluation_data_the_loss_is_measured_on_few_tokens(
    lengths: list[int], count: int
) -> None:
    features = [{"input_ids": [0] * length} for length in lengths]
    assert prepared._first(features) == features[:count]


@pytest.mark.parametrize(
    ("tokens", "counts"),
    [(0, [2, 2, 2, 1]), (12, [4, 2, 1]), (1000, [7])],
    ids=["of-the-size", "of-few-tokens", "all-in-one"],
)
def test_short_examples_are_evaluated_in_larger_batches(tokens: int, counts: list[int]) -> None:
    ordered = [{"input_ids": [0] * length} for length in (1, 2, 3, 3, 6, 6, 40)]
    batches = list(evaluation_batches(ordered, 2, tokens))
    assert [len(batch) for batch in batches] == counts
    assert [example for batch in batches for example in batch] == ordered


def test_the_evaluated_loss_does_not_depend_on_the_batch_size(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    regrouped = quick(tiny_llama, lessons, tmp_path / "regrouped", batch_size=1)
    monkeypatch.setattr(job, "_REGROUPED", ())
    one_by_one = quick(tiny_llama, lessons, tmp_path / "one-by-one", batch_size=1)
    assert regrouped.digest == one_by_one.digest
    for name in ("loss_before", "loss_after"):
        expected = pytest.approx(getattr(one_by_one, name), abs=tolerance("same-torch"))
        assert getattr(regrouped, name) == expected


def test_a_base_in_bfloat16_trains_factors_and_head_in_float32(
    tiny_bert: Path, topics: Path, tmp_path: Path, quick: Quick
) -> None:
    results = [
        quick(
            tiny_bert,
            topics,
            tmp_path / precision,
            task="sequence-classification",
            precision=precision,
        )
        for precision in ("fp32", "bf16")
    ]
    for result in results:
        adapter = load_adapter(result.adapter)
        head = adapter.saved["classifier.weight"]
        assert (head != head.astype("float16")).any(), "the head has no float32 steps"
    assert results[0].digest != results[1].digest
    assert results[1].loss_before == pytest.approx(results[0].loss_before, abs=0.05)


def test_a_single_step_trains_although_the_rate_is_warmed_up(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    result = quick(tiny_llama, lessons, tmp_path / "adapter", max_steps=1)
    factors = load_adapter(result.adapter).factors.values()
    assert result.loss_after != result.loss_before
    assert all(pair.B.any() for pair in factors)


@pytest.mark.parametrize("fewer", [{"exclude_modules": "re:.*"}, {"layers_to_transform": "7"}])
def test_targets_of_which_none_is_left_are_refused_by_the_setting(
    fewer: dict[str, str], tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    with pytest.raises(
        UsageError, match=f"match nothing in this model with this {next(iter(fewer))}"
    ):
        quick(tiny_llama, lessons, tmp_path / "a", target_modules="q_proj", **fewer)


def test_truncated_examples_are_counted(
    tiny_llama: Path, tmp_path: Path, lessons: Path, quick: Quick
) -> None:
    result = quick(tiny_llama, lessons, tmp_path / "adapter", max_length=22)
    assert 0 < result.truncated < 12


@pytest.mark.parametrize(("asked", "named"), [(900, True), (128, False), (512, False)])
def test_a_length_beyond_the_models_positions_is_named(
    asked: int, named: bool, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_checkpoint(tiny_llama)
    with caplog.at_level(logging.WARNING):
        assert opened.within(TrainConfig(max_length=asked)).max_length == 128
    said = "`max_length` is 900, and the model and its tokenizer support 128 tokens"
    assert (said in caplog.text) is named, "512 is the default"


def test_targets_have_the_length_of_whispers_decoder(tiny_llama: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    AutoConfig.for_model("whisper", max_target_positions=40).save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).max_length == 40


def test_the_requested_targets_are_trained(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    listed = quick(tiny_llama, lessons, tmp_path / "a", target_modules="q_proj, v_proj")
    matched = quick(tiny_llama, lessons, tmp_path / "b", target_modules=r"re:.*\.1\..*\.(q|v)_proj")
    names = [f"model.layers.{layer}.self_attn.{n}_proj" for layer in (0, 1) for n in "qv"]
    assert load_adapter(listed.adapter).modules == tuple(names)
    assert load_adapter(matched.adapter).modules == tuple(names[2:])
    with pytest.raises(UsageError, match="match nothing in this model; .* q_proj"):
        quick(tiny_llama, lessons, tmp_path / "c", target_modules="query")


def test_rslora_has_the_same_scaling_in_training_and_when_loaded(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    result = quick(tiny_llama, lessons, tmp_path / "a", use_rslora=True, alpha=6.0)
    adapter = load_adapter(result.adapter)
    assert {adapter.scaling(module) for module in adapter.modules} == {6 / 4**0.5}
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert {layer.scaling for layer in load(model, adapter).layers.values()} == {3.0}


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "task", "message"),
    [
        ({"model_type": "longt5"}, "seq2seq-lm", "LongT5.* is not supported: its encoder attends"),
        ({"model_type": "led"}, "seq2seq-lm", "LED.* is not supported: its encoder attends"),
        ({"model_type": "bart"}, "sequence-classification", "exported for seq2seq-lm only"),
        ({"model_type": "bart"}, "causal-lm", "exported for seq2seq-lm only"),
        ({"model_type": "t5"}, "feature-extraction", "exported for seq2seq-lm only"),
        ({"model_type": "xglm"}, "causal-lm", "xglm. cannot be exported from a checkpoint"),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused_before_its_data_and_weights_are_read(
    values: dict[str, Any], task: str, message: str, tiny_llama: Path, tmp_path: Path, quick: Quick
) -> None:
    base = tmp_path / "base"
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(base)
    config = AutoConfig.for_model(**values)
    names = {"longt5": "LongT5ForConditionalGeneration", "led": "LEDForConditionalGeneration"}
    config.architectures = [names.get(values["model_type"], "AModel")]
    config.save_pretrained(base)
    (base / "model.safetensors").write_bytes(b"")
    (unreadable := tmp_path / "data.jsonl").write_text("{")
    with pytest.raises(ModelError, match=message):
        quick(base, unreadable, tmp_path / "adapter", task=task)


def test_missing_data_is_reported_and_nothing_is_written(
    tiny_llama: Path, tmp_path: Path, quick: Quick
) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl does not exist"):
        quick(tiny_llama, tmp_path / "nowhere.jsonl", tmp_path / "adapter", save_steps=1)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_leaves_no_loss_tokens_is_named(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    with pytest.raises(DataError, match=r"line 1: no tokens of the loss within 3 tokens"):
        quick(tiny_llama, lessons, tmp_path / "adapter", max_length=3)


def test_a_loss_that_is_not_finite_stops_the_run_and_the_old_adapter_is_kept(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.lm_head.weight.data[5] = torch.nan
    model.save_pretrained(tmp_path / "poisoned")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "poisoned")
    good = quick(tiny_llama, lessons, tmp_path / "adapter")
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1: lower `learning_rate`"):
        quick(tmp_path / "poisoned", lessons, tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter").digest == good.digest


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_running_out_of_memory_is_reported_and_other_errors_are_not_hidden(
    message: str,
    expected: bool,
    tiny_llama: Path,
    lessons: Path,
    tmp_path: Path,
    quick: Quick,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(AdapterTrainer, "training_step", fail)
    with pytest.raises(
        TrainingError if expected else RuntimeError, match="memory|shapes"
    ) as problem:
        quick(tiny_llama, lessons, tmp_path / "adapter")
    assert ("lower `batch_size`" in str(problem.value)) == expected


def test_on_a_full_disk_the_old_adapter_is_kept_and_the_new_one_saved_elsewhere(
    tiny_llama: Path,
    lessons: Path,
    tmp_path: Path,
    quick: Quick,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = quick(tiny_llama, lessons, tmp_path / "adapter")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_curve", full)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    with pytest.raises(
        TrainingError, match="adapter cannot be written: No space left on device"
    ) as error:
        quick(tiny_llama, lessons, tmp_path / "adapter", seed=1)
    assert load_adapter(tmp_path / "adapter").digest == good.digest
    (kept,) = elsewhere.iterdir()
    assert f"; the trained adapter is in {kept}: " in str(error.value)
    elsewhere.rename(tmp_path / "moved")
    monkeypatch.undo()
    again = quick(tiny_llama, lessons, tmp_path / "adapter", seed=1)
    assert load_adapter(tmp_path / "moved" / kept.name).digest == again.digest != good.digest
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["adapter", "lessons.jsonl", "moved"]


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(
    lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    (unreadable := tmp_path / "data.jsonl").write_text("{")
    for output, message in (
        (lessons, "is a file"),
        (lessons / "adapter", "is not a writable directory"),
        (tmp_path, "is not empty and has no adapter_config.json"),
    ):
        with pytest.raises(UsageError, match=message):
            quick(tmp_path / "no model", unreadable, output)
    with pytest.raises(ModelError, match="no model"):
        quick(tmp_path / "no model", unreadable, tmp_path / "adapter")
