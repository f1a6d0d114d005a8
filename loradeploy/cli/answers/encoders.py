"""Results of classifiers, token classifiers and embedders, as `loradeploy run` prints them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loradeploy.adapter.heads import REGRESSION
from loradeploy.cli.answers.printer import Printer
from loradeploy.errors import UsageError
from loradeploy.printable import printable

if TYPE_CHECKING:
    from loradeploy.runtime.adapters.resident import AdapterSpec
    from loradeploy.runtime.session import AdapterSession
    from loradeploy.runtime.tasks.classification import Classification


def classify(
    session: AdapterSession,
    prompts: Sequence[Any],
    adapters: Sequence[AdapterSpec | None],
    batch_size: int,
    printer: Printer,
    **options: Any,
) -> None:
    """Print the labels of each text, or its numbers."""
    from loradeploy.runtime.tasks.classification import TextClassifier

    results = TextClassifier(session)(_texts(prompts), adapters, batch_size=batch_size, **options)
    for prompt, result in zip(prompts, results, strict=True):
        given = prompt if isinstance(prompt, tuple) else (prompt,)
        texts = dict(zip(("text", "text_pair"), given, strict=False))
        values = {**texts, **asdict(result), "labels": list(result.labels)}
        printer.result(_answer(result), values)


def _answer(result: Classification) -> str:
    """Return the labels with their scores, or the numbers, separated by tabs."""
    if result.problem_type == REGRESSION:
        return "\t".join(f"{value:.6g}" for value in result.scores.values())
    scored = (f"{printable(name)}\t{result.scores[name]:.4f}" for name in result.labels)
    return "\t".join(scored) or "(no label)"


def tag(
    session: AdapterSession,
    prompts: Sequence[Any],
    adapters: Sequence[AdapterSpec | None],
    batch_size: int,
    printer: Printer,
    *,
    ignore_label: Sequence[str] | None = None,
    **options: Any,
) -> None:
    """Print the entities of each text."""
    from loradeploy.runtime.tasks.tokens import TokenClassifier

    if ignore_label is not None:
        options["ignore_labels"] = ignore_label
    results = TokenClassifier(session)(_texts(prompts), adapters, batch_size=batch_size, **options)
    for text, result in zip(prompts, results, strict=True):
        found = [
            f"{printable(text[entity.start : entity.end].strip())} ({printable(entity.label)},"
            f" {entity.score:.4f})"
            for entity in result.entities
        ]
        entities = [asdict(entity) for entity in result.entities]
        values = {"text": text, "entities": entities, "adapter": result.adapter}
        printer.result("; ".join(found) or "(no entity)", values)


def embed(
    session: AdapterSession,
    prompts: Sequence[Any],
    adapters: Sequence[AdapterSpec | None],
    batch_size: int,
    printer: Printer,
    *,
    prompt_name: str | None = None,
) -> None:
    """Print the vector of each text."""
    from loradeploy.runtime.tasks.embedding import TextEmbedder

    vectors = TextEmbedder(session)(
        _texts(prompts), adapters, prompt_name=prompt_name, batch_size=batch_size
    )
    for text, adapter, row in zip(prompts, adapters, vectors, strict=True):
        _print_vector(printer, row, {"text": text}, adapter)


def _print_vector(
    printer: Printer, row: Any, given: Mapping[str, Any], adapter: AdapterSpec | None
) -> None:
    vector = [float(f"{value:.7g}") for value in row]
    printer.result(json.dumps(vector), {**given, "embedding": vector, "adapter": adapter})


def classify_images(
    session: AdapterSession,
    prompts: Sequence[Any],
    adapters: Sequence[AdapterSpec | None],
    batch_size: int,
    printer: Printer,
) -> None:
    """Print the labels of each image."""
    from loradeploy.runtime.tasks.images import ImageClassifier

    results = ImageClassifier(session)(_texts(prompts), adapters, batch_size=batch_size)
    for prompt, result in zip(prompts, results, strict=True):
        values = {"image": prompt, **asdict(result), "labels": list(result.labels)}
        printer.result(_answer(result), values)


def embed_images(
    session: AdapterSession,
    prompts: Sequence[Any],
    adapters: Sequence[AdapterSpec | None],
    batch_size: int,
    printer: Printer,
) -> None:
    """Print the vector of each image."""
    from loradeploy.runtime.tasks.images import ImageEmbedder

    vectors = ImageEmbedder(session)(_texts(prompts), adapters, batch_size=batch_size)
    for image, adapter, row in zip(prompts, adapters, vectors, strict=True):
        _print_vector(printer, row, {"image": image}, adapter)


def _texts(prompts: Sequence[Any]) -> list[Any]:
    for number, prompt in enumerate(prompts, start=1):
        if isinstance(prompt, list):
            raise UsageError(f"prompt {number} is a conversation: this bundle takes texts")
    return list(prompts)
