"""Training learns, is repeatable, resumes, and writes what PEFT and the runtime read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loradeploy.adapter import base_digest, load_adapter
from loradeploy.errors import DataError, ModelError, TrainingError, UsageError
from loradeploy.lora.inject import inject
from loradeploy.train.api import TrainResult, train
from loradeploy.train.config import TrainConfig, read_config
from loradeploy.train.data import read_conversations, read_labelled_texts
from loradeploy.train.features import IGNORED, Collator, conversation_features
from loradeploy.train.job import _adapter_config
from loradeploy.train.trainer import AdapterTrainer, arguments
from tests.tolerances import tolerance

LESSONS = [
    {"prompt": f"Question {number}:", "completion": f" answer {number % 3}."}
    for number in range(12)
]


@pytest.fixture
def lessons(tmp_path: Path) -> Path:
    file = tmp_path / "lessons.jsonl"
    file.write_text("".join(json.dumps(lesson) + "\n" for lesson in LESSONS))
    return file


@pytest.fixture
def topics(bbc: Path, tmp_path: Path) -> Path:
    """A few stories of three topics, in class folders."""
    place = tmp_path / "topics"
    for topic in ("business", "sports", "tech"):
        (place / topic).mkdir(parents=True)
        for file in sorted((bbc / topic).glob("*.txt"))[:9]:
            text = file.read_text(errors="replace")
            (place / topic / file.name).write_text(text[:200])
    return place


def quick(model: Path, data: Path, output: Path, **flags: Any) -> TrainResult:
    settings = {"max_steps": 20, "batch_size": 4, "rank": 4, "max_length": 64, **flags}
    return train(model, data, output, **settings)


def test_training_lowers_the_loss_and_writes_all_that_was_promised(
    tiny_llama: Path, lessons: Path, tmp_path: Path
) -> None:
    result = quick(tiny_llama, lessons, tmp_path / "adapter", learning_rate=5e-3)

    assert result.steps == 20
    assert result.loss_after < 0.8 * result.loss_before
    assert {file.name for file in result.adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.csv",
        "loss.png",
        "train.yaml",
    }
    curve = list(csv.DictReader((result.adapter / "loss.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in curve] == list(range(1, 21))
    assert (result.adapter / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert read_config(result.adapter / "train.yaml").max_steps == 20
    adapter = load_adapter(result.adapter)
    assert adapter.digest == result.digest
    assert adapter.base_digest == base_digest(tiny_llama) == result.base_digest


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_peft_computes_the_loss_that_training_reports(
    model: str, lessons: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import peft

    directory = request.getfixturevalue(model)
    result = quick(directory, lessons, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    base = AutoModelForCausalLM.from_pretrained(directory).eval()
    adapted = peft.PeftModel.from_pretrained(base, result.adapter).eval()
    features = conversation_features(read_conversations(lessons), tokenizer, 64)
    batch = Collator(tokenizer.pad_token_id)(features)
    with torch.no_grad():
        theirs = float(adapted(**batch).loss)
        base_loss = float(adapted.unload()(**batch).loss)
    assert theirs == pytest.approx(result.loss_after, abs=tolerance("same-torch") * 10)
    assert base_loss == pytest.approx(result.loss_before, abs=tolerance("same-torch") * 10)


def test_the_same_seed_gives_the_same_adapter_bit_for_bit(
    tiny_llama: Path, lessons: Path, tmp_path: Path
) -> None:
    one, same, other = (
        quick(tiny_llama, lessons, tmp_path / name, seed=seed, dropout=0.1, max_steps=4)
        for name, seed in (("one", 3), ("same", 3), ("other", 4))
    )
    assert one.digest == same.digest != other.digest
    for file in ("adapter_model.safetensors", "adapter_config.json", "loss.csv", "loss.png"):
        assert (one.adapter / file).read_bytes() == (same.adapter / file).read_bytes()


def test_a_resumed_run_ends_at_the_same_adapter(
    tiny_llama: Path, lessons: Path, tmp_path: Path
) -> None:
    settings = {
        "max_steps": 8,
        "save_steps": 4,
        "dropout": 0.1,
        "schedule": "constant",
        "warmup_steps": 2,
    }
    whole = quick(tiny_llama, lessons, tmp_path / "whole", **settings)
    quick(tiny_llama, lessons, tmp_path / "cut", **{**settings, "max_steps": 4})
    resumed = quick(tiny_llama, lessons, tmp_path / "cut", resume=True, **settings)
    assert resumed.digest == whole.digest
    with pytest.raises(UsageError, match="nothing to resume"):
        quick(tiny_llama, lessons, tmp_path / "fresh", resume=True)


def test_a_classifier_learns_its_labels_and_keeps_its_head(
    tiny_bert: Path, topics: Path, tmp_path: Path
) -> None:
    import peft

    result = quick(
        tiny_bert,
        topics,
        tmp_path / "adapter",
        task="sequence-classification",
        max_steps=40,
        learning_rate=5e-3,
    )
    adapter = load_adapter(result.adapter)
    assert adapter.labels == ("business", "sports", "tech")
    assert set(adapter.saved) == {"classifier.weight", "classifier.bias"}
    assert result.accuracy_after is not None
    assert result.accuracy_before is not None
    assert result.accuracy_after > max(0.6, result.accuracy_before)

    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    theirs = peft.PeftModel.from_pretrained(base, result.adapter)
    head = theirs.base_model.model.classifier.modules_to_save["default"].weight
    torch.testing.assert_close(head, torch.tensor(adapter.saved["classifier.weight"]))


def test_a_validation_split_is_not_trained_on(
    tiny_llama: Path, lessons: Path, tmp_path: Path
) -> None:
    result = quick(
        tiny_llama, lessons, tmp_path / "a", validation_split=0.25, epochs=1.0, max_steps=0
    )
    assert result.steps == 3, "9 of 12 examples in batches of 4"


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_logits_at_labels_alone_give_the_loss_and_gradients_of_all_logits(
    model: str, lessons: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    features = conversation_features(read_conversations(lessons), tokenizer, 64)
    batch = Collator(tokenizer.pad_token_id)(features)
    base = AutoModelForCausalLM.from_pretrained(directory)
    config = TrainConfig(rank=4)
    injection = inject(base, _adapter_config(directory, config, ()))
    for layer in injection.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    trainer = AdapterTrainer(
        injection=injection, config=config, args=arguments(config, tmp_path, steps=1)
    )
    ours = trainer.compute_loss(base, batch)
    theirs = base(**batch).loss
    gradients = [
        torch.autograd.grad(loss, injection.parameters(), retain_graph=True)
        for loss in (ours, theirs)
    ]
    assert abs(float((ours - theirs).detach())) <= tolerance("same-torch")
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance("same-torch"), rtol=1e-4)


def test_the_loss_is_on_completions_alone(tiny_llama: Path, lessons: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    (feature, *_) = conversation_features(read_conversations(lessons), tokenizer, 64)
    learnt = [label for label in feature["labels"] if label != IGNORED]
    assert tokenizer.decode(learnt) == " answer 0.<|im_end|>"
    assert tokenizer.decode(feature["input_ids"]) == "Question 0: answer 0.<|im_end|>"


def test_the_loss_is_on_what_the_assistant_says(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "good day"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "bye"},
    ]
    file.write_text(json.dumps({"messages": messages}))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    (feature,) = conversation_features(read_conversations(file), tokenizer, 128)
    learnt = [label for label in feature["labels"] if label != IGNORED]
    assert tokenizer.decode(learnt) == "good day<|im_end|>\nbye<|im_end|>\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no examples"),
        ('{"text": "fine"}\n{"text": \n', "line 2: not JSON"),
        ('{"text": "fine"}\n\n[1]\n', "line 3: a JSON list"),
        ('{"prompt": "a"}\n', "line 1: has prompt; it needs"),
        ('{"prompt": "a", "completion": ""}\n', "line 1: completion is ''"),
        ('{"prompt": 3, "completion": "b"}\n', "line 1: prompt is 3"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: messages is no list of objects"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "nothing to learn"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_broken_line_is_named(content: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as refusal:
        read_conversations(file)
    assert "data.jsonl" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx,1\ny,1\n", "all examples have the label '1'"),
        ("a.csv", "text,topic\nx,1\n", "no column label"),
        ("a.csv", 'text,label\n"x,1\n', "not CSV"),
        ("a.csv", "text,label\nx,\n", "line 2: label is ''"),
        ("a.jsonl", '{"text": "x", "label": null}\n', "line 1: label is None"),
        ("a.jsonl", '{"label": "x"}\n', "line 1: text is None"),
    ],
)
def test_a_broken_label_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_labelled_texts(tmp_path / name)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "folders"])
def test_labelled_texts_are_read_the_same_from_every_form(suffix: str, tmp_path: Path) -> None:
    rows = [("one, two", "a"), ('say "hi"', "b")]
    place = tmp_path / f"data.{suffix}"
    if suffix == "csv":
        with place.open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    elif suffix == "jsonl":
        place.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows))
    else:
        for text, label in rows:
            (place / label).mkdir(parents=True)
            (place / label / "1.txt").write_text(text)
    assert [(example.text, example.label) for example in read_labelled_texts(place)] == rows


def test_missing_data_is_said_and_nothing_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.jsonl does not exist"):
        quick(tiny_llama, tmp_path / "nowhere.jsonl", tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_leaves_nothing_to_learn_is_named(
    tiny_llama: Path, lessons: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"line 1: nothing to learn from within 3 tokens"):
        quick(tiny_llama, lessons, tmp_path / "adapter", max_length=3)


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny_llama: Path, lessons: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.lm_head.weight.data[5] = torch.nan
    model.save_pretrained(tmp_path / "poisoned")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "poisoned")
    with pytest.raises(TrainingError, match="the loss is nan at step 1: lower the learning rate"):
        quick(tmp_path / "poisoned", lessons, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_place_without_a_model_is_said(name: str, lessons: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=name):
        quick(tmp_path / name, lessons, tmp_path / "adapter")


def test_an_encoder_is_refused_as_a_language_model(
    tiny_bert: Path, lessons: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="causal-lm"):
        quick(tiny_bert, lessons, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 4", "no setting 'rnak': did you mean rank?"),
        ("rank: four", "rank is 'four'"),
        ("rank: 0", "rank is 0"),
        ("use_rslora: 1", "use_rslora is 1"),
        ("schedule: wavy", "schedule is 'wavy'"),
        ("task: poetry", "task is 'poetry'"),
        ("- rank", "holds no settings"),
        ("rank: [", "not readable as YAML"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_config(tmp_path / "train.yaml")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("rank: 4\nlearning_rate: 1e-4\n")
    config = read_config(tmp_path / "train.yaml", {"rank": 16})
    assert (config.rank, config.learning_rate) == (16, 1e-4)
