"""Every task of the table can be trained, from every format of data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loradeploy.adapter import load_adapter
from loradeploy.errors import DataError
from loradeploy.train.data.examples import read_conversations, read_labeled_texts, read_tagged_words
from loradeploy.train.data.sources import Source
from loradeploy.train.tasks.losses import multi_label_loss, regression_loss
from tests.inputs.training_data import as_form, multi_label, pairs, regression, tagged
from tests.tolerances import tolerance
from tests.train.conftest import Quick, write_lines

LEARNING = {"max_steps": 30, "batch_size": 8, "learning_rate": 2e-2, "warmup_steps": 2}


TASKS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str, tuple[str, ...] | None]] = {
    "multi-label": (
        multi_label,
        {"task": "sequence-classification", "problem_type": "multi-label"},
        "SEQ_CLS",
        ("business", "sports", "tech"),
    ),
    "regression": (
        regression,
        {"task": "sequence-classification", "problem_type": "regression"},
        "SEQ_CLS",
        None,
    ),
    "token-classification": (
        tagged,
        {"task": "token-classification"},
        "TOKEN_CLS",
        ("O", "business", "sports", "tech"),
    ),
    "feature-extraction": (pairs, {"task": "feature-extraction"}, "FEATURE_EXTRACTION", None),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_trained_and_its_adapter_read_by_peft(
    task: str, tiny_bert: Path, tmp_path: Path, quick: Quick, caplog: pytest.LogCaptureFixture
) -> None:
    import peft

    make, settings, peft_name, labels = TASKS[task]
    data = make(tmp_path / "data.jsonl")
    result = quick(tiny_bert, data, tmp_path / "adapter", **LEARNING, **settings)
    assumed = "has no modules.json: the embedder is trained with mean pooling" in caplog.text
    assert assumed == (task == "feature-extraction")
    # Half of a batch can be of the anchor's topic, which a sentence encoder cannot tell apart.
    assert result.loss_after < (0.85 if task == "feature-extraction" else 0.7) * result.loss_before
    if task == "regression":
        assert result.accuracy_after is None
    else:
        assert result.accuracy_before is not None and result.accuracy_after is not None
        assert result.accuracy_after > result.accuracy_before
    adapter = load_adapter(result.adapter)
    assert (adapter.config.task_type, adapter.labels) == (peft_name, labels)
    assert bool(adapter.saved) == (task != "feature-extraction"), "a head is trained whole"
    problems = {"multi-label": "multi_label_classification", "regression": "regression"}
    assert adapter.problem_type == problems.get(task)
    assert peft.PeftConfig.from_pretrained(str(result.adapter)).task_type == peft_name


@pytest.mark.parametrize("problem", ["multi-label", "regression"])
def test_the_loss_of_a_classifier_is_that_of_transformers(problem: str, tiny_bert: Path) -> None:
    count, name = (3, "multi_label_classification") if problem == "multi-label" else (1, problem)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=count, problem_type=name
    ).eval()
    ids = torch.randint(5, 40, (4, 6))
    labels = torch.randint(2, (4, count)).float()
    batch = {"input_ids": ids, "labels": labels if count > 1 else labels.squeeze(1)}
    loss = {"multi-label": multi_label_loss, "regression": regression_loss}[problem]
    with torch.no_grad():
        ours, theirs = loss(model, batch), model(**batch).loss
    assert float(ours.total / ours.items) == pytest.approx(float(theirs), abs=1e-6)


def test_every_number_of_a_regression_counts(tiny_bert: Path, tmp_path: Path, quick: Quick) -> None:
    """Also -100, which marks ignored labels elsewhere."""
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate([-100.0, 0.0, 50.0])]
    settings = {"task": "sequence-classification", "problem_type": "regression", "max_steps": 1}
    data = write_lines(tmp_path / "data.jsonl", rows)
    result = quick(tiny_bert, data, tmp_path / "adapter", **settings)
    _, row = (tmp_path / "adapter" / "loss.csv").read_text().splitlines()
    assert float(row.split(",")[1]) == pytest.approx(result.loss_before, rel=0.1)


def test_the_first_token_of_a_word_has_its_tag(tiny_bert: Path) -> None:

    from loradeploy.train.data.examples import TaggedWords
    from loradeploy.train.data.features import word_features

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    example = TaggedWords("here", ("a", "unbelievablylong", "b"), ("X", "Y", "X"))
    (feature,) = word_features([example], ("X", "Y"), tokenizer, 64).features
    marked = [mark for mark in feature["labels"] if mark != -100]
    assert marked == [0, 1, 0]
    assert len(feature["labels"]) == len(feature["input_ids"]) > 3


# -- formats ------------------------------------------------------------------------------------

LESSONS = [{"prompt": f"Question {n}:", "completion": f" answer {n}, surely"} for n in range(4)]


FORMS = ("jsonl", "csv", "parquet", "dataset", "dataset-of-splits")


@pytest.mark.parametrize("form", FORMS)
def test_examples_are_the_same_from_every_format(form: str, tmp_path: Path) -> None:
    found = read_conversations(Source(as_form(form, tmp_path / "data", LESSONS)))
    parts = [(("Question 1:", False), (" answer 1, surely", True))]
    assert [example.parts for example in found][1:2] == parts
    assert len(found) == 4


@pytest.mark.parametrize("form", FORMS)
def test_columns_of_other_names_are_mapped(form: str, tmp_path: Path) -> None:
    lines = [{"text": line["completion"], "label": "ab"[n % 2]} for n, line in enumerate(LESSONS)]
    others = [{"body": line["text"], "topic": line["label"], "text": "not this"} for line in lines]
    columns = {"text": "body", "label": "topic"}
    found = read_labeled_texts(Source(as_form(form, tmp_path / "data", others), columns=columns))
    assert [(e.text, e.label) for e in found] == [(e["text"], e["label"]) for e in lines]
    with pytest.raises(DataError, match=r"no column topik"):
        wrong = {**columns, "label": "topik"}
        read_labeled_texts(Source(as_form(form, tmp_path / "again", others), columns=wrong))


def test_class_features_of_a_dataset_become_label_names(tmp_path: Path) -> None:
    feature = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    lines = {"text": ["a", "b"], "label": [1, 0]}
    datasets.Dataset.from_dict(lines, features=feature).save_to_disk(tmp_path / "data")
    found = read_labeled_texts(Source(tmp_path / "data"))
    assert [example.label for example in found] == ["yes", "no"]


def test_unreadable_data_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    splits = as_form("dataset-of-splits", tmp_path / "data", LESSONS)
    for source, message in (
        (Source(tmp_path / "broken.parquet"), "is not a readable Parquet file"),
        (Source(tmp_path / "missing.parquet"), "does not exist"),
        (Source("somebody/some-dataset"), "is not a file, and cannot be read as a dataset"),
        (Source(splits, "validation"), "has no split 'validation': it has train, test"),
    ):
        with pytest.raises(DataError, match=message) as refusal:
            read_conversations(source)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a"], "tags": []}, "line 1: tags is .*, expected a list of texts"),
        ({"tokens": ["a", "b"], "tags": ["X"]}, "line 1: 2 tokens and 1 tags"),
        ({"tokens": "a b", "tags": ["X"]}, "line 1: tokens is 'a b'"),
    ],
)
def test_words_without_a_tag_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_tagged_words(Source(write_lines(tmp_path / "a.jsonl", [row])))


# -- evaluation data ----------------------------------------------------------------------------


def test_given_evaluation_data_is_used(
    tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    others = write_lines(tmp_path / "others.jsonl", [{"prompt": "Why?", "completion": " Because."}])
    result = quick(tiny_llama, lessons, tmp_path / "adapter", validation=str(others))
    plain = quick(tiny_llama, lessons, tmp_path / "plain")
    assert (result.evaluated_on, plain.evaluated_on) == ("validation", "training")
    assert result.digest == plain.digest
    assert result.loss_before != plain.loss_before


def test_a_split_of_the_dataset_can_be_the_evaluation_data(
    tiny_llama: Path, tmp_path: Path, quick: Quick
) -> None:
    data = as_form("dataset-of-splits", tmp_path / "data", LESSONS)
    result = quick(tiny_llama, data, tmp_path / "adapter", validation="test")
    assert (result.examples, result.evaluated_on) == (4, "validation")


def test_an_evaluation_label_without_training_data_is_named(
    tiny_bert: Path, topics: Path, tmp_path: Path, quick: Quick
) -> None:
    others = [{"text": "rain", "label": "weather"}, {"text": "oil", "label": "business"}]
    file = write_lines(tmp_path / "others.jsonl", others)
    with pytest.raises(
        DataError, match=r"line 1: the label 'weather' is not one of those trained on"
    ):
        quick(
            tiny_bert,
            topics,
            tmp_path / "adapter",
            task="sequence-classification",
            validation=str(file),
        )


def test_a_single_class_is_enough_for_evaluation_but_not_for_training(
    tiny_bert: Path, tmp_path: Path, quick: Quick
) -> None:
    task = "sequence-classification"
    two = write_lines(tmp_path / "two.jsonl", [{"text": t, "label": t} for t in ("a", "b")])
    one = write_lines(tmp_path / "one.jsonl", [{"text": "a", "label": "a"}])
    result = quick(
        tiny_bert, two, tmp_path / "adapter", task=task, validation=str(one), max_steps=1
    )
    assert result.evaluated_on == "validation"
    with pytest.raises(DataError, match="all examples have the label 'a'; two are needed"):
        quick(tiny_bert, one, tmp_path / "adapter", task=task)


# -- methods ------------------------------------------------------------------------------------


@pytest.mark.breadth(2)
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"init": "pissa"},
        {"init": "olora", "use_rslora": True},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 2, "up_proj": 8}, "alpha_pattern": "q_proj=3"},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "v_proj"]},
        {"exclude_modules": "k_proj", "lora_plus_ratio": 4},
        {"modules_to_save": "norm"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_method_is_trained_with_its_settings_and_read_by_peft(
    settings: dict[str, Any], tiny_llama: Path, lessons: Path, tmp_path: Path, quick: Quick
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    from loradeploy.lora.inject import load

    result = quick(
        tiny_llama, lessons, tmp_path / "adapter", max_steps=8, learning_rate=5e-3, **settings
    )
    assert result.loss_after < result.loss_before
    ids = torch.arange(3, 15)[None]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    load(model, load_adapter(result.adapter))
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama), str(result.adapter)
    ).eval()
    with torch.no_grad():
        difference = (model(ids).logits - theirs(ids).logits).abs().max()
    assert float(difference) <= tolerance("same-torch")
    written = json.loads((result.adapter / "adapter_config.json").read_text())
    for name, value in settings.items():
        if name in ("use_dora", "bias", "use_rslora"):
            assert written[name] == value
    if "rank_pattern" in settings:
        ranks = {
            m.rpartition(".")[2]: p.rank for m, p in load_adapter(result.adapter).factors.items()
        }
        assert (ranks["q_proj"], ranks["up_proj"], ranks["k_proj"]) == (2, 8, 4)
