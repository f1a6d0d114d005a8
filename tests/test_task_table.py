"""Every row of the task table is trained, exported, run and checked for parity, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import loradeploy as ld
from loradeploy.adapter.heads import TRAINED_PROBLEMS
from loradeploy.adapter.tasks import CLASSIFICATIONS, EVALUATED_TASKS, TASK_TABLE, TRAINED_TASKS
from loradeploy.cli.run import RUNNERS, runner_of
from loradeploy.errors import UsageError
from loradeploy.parity.score.measures import KINDS, MEASURED
from tests.cli.calling import call
from tests.inputs.training_data import (
    multi_label,
    pairs,
    regression,
    sentences,
    tagged,
    translations,
)
from tests.inputs.vit import color_folders, make_vit
from tests.train.conftest import WORDS, write_lessons, write_lines

ROOT = Path(__file__).parent.parent
STEPS = {"max_steps": 40, "batch_size": 8, "rank": 4, "learning_rate": 2e-2, "max_length": 64}
CLASSIFIER = {"task": "sequence-classification"}
NUMBERS = {"business": 1.5, "sports": -0.5}


def single_label(file: Path) -> Path:
    rows = [{"text": text, "label": topic} for topic in WORDS for text in sentences(topic)]
    return write_lines(file, rows)


def scored(file: Path) -> Path:
    rows = []
    for topic in WORDS:
        for other in WORDS:
            for first, second in zip(sentences(topic), reversed(sentences(other)), strict=True):
                score = 0.9 if topic == other else 0.1
                rows.append({"text": first, "text_pair": second, "score": score})
    return write_lines(file, rows)


# By task: adapters that share a bundle, each with the writer of its data and its settings.
ROWS: dict[str, dict[str, tuple[Callable[[Path], Path], dict[str, Any]]]] = {
    "sequence-classification": {
        "single": (single_label, CLASSIFIER),
        "multi": (multi_label, {**CLASSIFIER, "problem_type": "multi-label"}),
        "number": (regression, {**CLASSIFIER, "problem_type": "regression"}),
    },
    "causal-lm": {"lesson": (write_lessons, {"task": "causal-lm", "learning_rate": 5e-3})},
    "feature-extraction": {
        "pairs": (pairs, {"task": "feature-extraction"}),
        "scored": (scored, {"task": "feature-extraction", "embedding_loss": "cosine"}),
    },
    "seq2seq-lm": {
        "words": (
            translations,
            {"task": "seq2seq-lm", "max_steps": 120, "learning_rate": 1e-2},
        )
    },
    "image-classification": {
        "colors": (color_folders, {"task": "image-classification", "learning_rate": 2e-3}),
    },
    "token-classification": {"tags": (tagged, {"task": "token-classification"})},
}


def seen(task: str, values: dict[str, Any]) -> Any:
    """Return the part of a result for one text that depends on the adapter."""
    keys = {
        "sequence-classification": "scores",
        "token-classification": "entities",
        "image-classification": "scores",
        "feature-extraction": "embedding",
        "causal-lm": "token_ids",
        "seq2seq-lm": "token_ids",
    }
    return values[keys[task]]


@pytest.mark.breadth(3)
@pytest.mark.parametrize("task", ROWS)
def test_a_task_can_be_trained_exported_run_and_checked_for_parity(
    task: str, tiny_bert: Path, tiny_llama: Path, tiny_t5: Path, tmp_path: Path
) -> None:
    model = {"causal-lm": tiny_llama, "seq2seq-lm": tiny_t5}.get(task, tiny_bert)
    sees = task == "image-classification"
    if sees:
        model = make_vit(tmp_path / "model")
    data, adapters = {}, {}
    for name, (make, settings) in ROWS[task].items():
        data[name] = make(tmp_path / f"{name}.jsonl")
        ld.train(model, data[name], tmp_path / name, **{**STEPS, **settings})
        adapters[name] = tmp_path / name
    bundle = tmp_path / "bundle"
    manifest = ld.export(model, bundle, adapters=adapters)
    assert manifest.task == task

    text = f"{sentences('business')[1]} {sentences('sports')[2]}"
    if sees:
        text = str(data["colors"] / "red" / "0.png")
    # The base has no trained head, and classifies nothing.
    names = [*adapters] if task in CLASSIFICATIONS else [*adapters, None]
    lines = [{"text": text, "adapter": name} for name in names]
    if task in ("causal-lm", "seq2seq-lm"):
        lines = [{"prompt": line["text"], "adapter": line["adapter"]} for line in lines]
    asked = write_lines(tmp_path / "asked.jsonl", lines)
    printed = call("run", bundle, "--input", asked, "--json")
    answers = [json.loads(line) for line in printed.splitlines()]
    given = [json.dumps(seen(task, answer)) for answer in answers]
    assert len(set(given)) == len(given), "each adapter's effect is seen"

    scored = {} if task not in EVALUATED_TASKS else {"evaluate": data, "examples": 24}
    phases = ["padded batch"]
    few: dict[str, Any] = {"certificate": False, **scored}
    if not sees:  # parity draws its images from a seed
        few["prompts"] = [text, "Hi"]
    report = ld.parity(bundle, model=model, controls=True, phases=phases, **few)
    assert report.passed, report.failures
    assert report.controls and all(control.caught for control in report.controls)
    figures = {(score.adapter, score.metric): score for score in report.scores}
    if task in EVALUATED_TASKS:
        for name, (_, settings) in ROWS[task].items():
            kind = task
            if task == "sequence-classification":
                kind = TRAINED_PROBLEMS[settings.get("problem_type", "single-label")]
            if task == "image-classification":
                kind = "single_label_classification"
            if task == "feature-extraction":
                kind = "similarity" if "embedding_loss" in settings else "retrieval"
            if task == "seq2seq-lm":
                kind = "translation"
            assert {metric for own, metric in figures if own == name} == set(MEASURED[kind])
    for metric in (
        "accuracy",
        "micro_f1",
        "macro_f1",
        "entity_f1",
        "pearson",
        "recall_at_10",
        "chrf",
        "rouge_l",
    ):
        for (_, found), score in figures.items():
            least = 0.5 if task == "feature-extraction" else 0.7
            assert found != metric or score.value > least, f"{metric} of what was learned"

    name = next(iter(adapters))
    ld.export(bundle, tmp_path / "merged", adapters={name: adapters[name]}, merge=True)
    once: dict[str, Any] = {"model": model, "adapters": {name: adapters[name]}, **few}
    if task in EVALUATED_TASKS:
        once["evaluate"] = data[name]
    assert ld.parity(tmp_path / "merged", **once).passed
    (alone,) = [call("run", tmp_path / "merged", text, "--json")]
    if task in ("sequence-classification", "image-classification"):
        assert json.loads(alone)["label"] == answers[0]["label"]


@pytest.mark.parametrize("name", TASK_TABLE)
def test_a_task_that_is_not_in_the_table_is_refused_by_name(name: str) -> None:
    task = TASK_TABLE[name]
    assert (name in ROWS) == task.trained == (name in TRAINED_TASKS)
    assert (name in RUNNERS) == (task.runner is not None)
    assert task.runner is None or task.runner in ld.__all__
    if not task.trained:
        with pytest.raises(UsageError, match=f"task` is '{name}': give one of causal-lm"):
            ld.TrainConfig(task=name)


def test_a_vision_tower_is_neither_run_nor_served_and_the_refusal_names_what_runs_it() -> None:
    pytest.importorskip("fastapi")
    from loradeploy.serve.service import Service
    from loradeploy.serve.settings import ServeLimits

    session: Any = SimpleNamespace(path="tower", manifest=SimpleNamespace(task="vision-tower"))
    with pytest.raises(UsageError, match="cannot run alone: give the bundle of the decoder"):
        runner_of(session)
    with pytest.raises(UsageError, match="is not served, .*: run it with ImageTextGenerator"):
        Service(session, limits=ServeLimits())


def test_the_documentation_has_the_table_of_tasks() -> None:
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    for name, task in TASK_TABLE.items():
        runner = f"`{task.runner}`" if task.runner else "`AdapterSession.run`"
        trained = "yes" if task.trained else "refused by name"
        kinds = KINDS.get(name, [name])
        metrics = "; ".join(", ".join(MEASURED[kind]) for kind in kinds if kind in MEASURED)
        scored = metrics if task.evaluated else "refused by name"
        row = f"| `{name}` | {trained} | yes | yes | {runner} | yes | {scored} |"
        assert row in page, row
