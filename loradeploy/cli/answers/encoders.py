"""Results of classifiers, token classifiers and embedders, as `loradeploy run` prints them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.heads import REGRESSION
from loradeploy.cli.answers.printer import Job
from loradeploy.errors import UsageError
from loradeploy.printable import printable

if TYPE_CHECKING:
    from loradeploy.runtime.tasks.classification import Classification


def classify(job: Job, **options: Any) -> None:
    """Print the labels of each text, or its numbers."""
    from loradeploy.runtime.tasks.classification import TextClassifier

    for prompt, result in _results(TextClassifier, job, **options):
        given = prompt if isinstance(prompt, tuple) else (prompt,)
        texts = dict(zip(("text", "text_pair"), given, strict=False))
        values = {**texts, **asdict(result), "labels": list(result.labels)}
        job.printer.result(_answer(result), values)


def _answer(result: Classification) -> str:
    """Return the labels with their scores, or the numbers, separated by tabs."""
    if result.problem_type == REGRESSION:
        return "\t".join(f"{value:.6g}" for value in result.scores.values())
    scored = (f"{printable(name)}\t{result.scores[name]:.4f}" for name in result.labels)
    return "\t".join(scored) or "(no label)"


def tag(job: Job, *, ignore_label: Sequence[str] | None = None, **options: Any) -> None:
    """Print the entities of each text."""
    from loradeploy.runtime.tasks.tokens import TokenClassifier

    if ignore_label is not None:
        options["ignore_labels"] = ignore_label
    for text, result in _results(TokenClassifier, job, **options):
        found = [
            f"{printable(text[entity.start : entity.end].strip())} ({printable(entity.label)},"
            f" {entity.score:.4f})"
            for entity in result.entities
        ]
        entities = [asdict(entity) for entity in result.entities]
        values = {"text": text, "entities": entities, "adapter": result.adapter}
        job.printer.result("; ".join(found) or "(no entity)", values)


def embed(job: Job, **options: Any) -> None:
    """Print the vector of each text."""
    from loradeploy.runtime.tasks.embedding import TextEmbedder

    _print_vectors("text", TextEmbedder, job, **options)


def classify_images(job: Job) -> None:
    """Print the labels of each image."""
    from loradeploy.runtime.tasks.images import ImageClassifier

    for prompt, result in _results(ImageClassifier, job):
        values = {"image": prompt, **asdict(result), "labels": list(result.labels)}
        job.printer.result(_answer(result), values)


def embed_images(job: Job) -> None:
    """Print the vector of each image."""
    from loradeploy.runtime.tasks.images import ImageEmbedder

    _print_vectors("image", ImageEmbedder, job)


def _print_vectors(kind: str, task: Callable[..., Any], job: Job, **options: Any) -> None:
    results = _results(task, job, **options)
    for (prompt, row), adapter in zip(results, job.adapters, strict=True):
        vector = [float(f"{value:.7g}") for value in row]
        values = {kind: prompt, "embedding": vector, "adapter": adapter}
        job.printer.result(json.dumps(vector), values)


def _results(task: Callable[..., Any], job: Job, **options: Any) -> list[tuple[Any, Any]]:
    """Each prompt with its result; `task` is a class of the runtime that is made with a session."""
    for number, prompt in enumerate(job.prompts, start=1):
        if isinstance(prompt, list):
            raise UsageError(f"prompt {number} is a conversation: this bundle takes texts")
    results = task(job.session)(job.prompts, job.adapters, batch_size=job.batch_size, **options)
    return list(zip(job.prompts, results, strict=True))
