"""The public names: adding one is a decision, removing one breaks users."""

from __future__ import annotations

import importlib
import importlib.metadata

import pytest

import loradeploy as ld
from loradeploy import errors
from tools.api_docs import PAGE, ROOMS, page

PUBLIC = [
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "AdapterMismatchError",
    "AdapterSession",
    "AdapterStoreError",
    "BudgetError",
    "BundleError",
    "CertificateMinimum",
    "Classification",
    "Completion",
    "DataError",
    "DeadlineError",
    "DeviceError",
    "Engine",
    "EngineClosedError",
    "EngineError",
    "EngineFullError",
    "EngineStatistics",
    "Entity",
    "ExportError",
    "Generation",
    "GenerationEvent",
    "GenerationOptions",
    "GraphForm",
    "ImageClassifier",
    "ImageEmbedder",
    "ImageTextGenerator",
    "Limit",
    "LoraDeployError",
    "Manifest",
    "MissingDependencyError",
    "ModelError",
    "OperatorError",
    "OutputError",
    "ParityReport",
    "RankedDocument",
    "RunError",
    "Segment",
    "SpeechRecognizer",
    "Submission",
    "TextClassifier",
    "TextEmbedder",
    "TextGenerator",
    "TextPairScorer",
    "TextPiece",
    "TextScore",
    "TokenClassification",
    "TokenClassifier",
    "TokenLogprob",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "TrainingInterruptedError",
    "Transcript",
    "UnknownAdapterError",
    "Usage",
    "UsageError",
    "assert_parity",
    "build_operator",
    "combine",
    "compare",
    "export",
    "load_adapter",
    "parity",
    "reduce_rank",
    "save_adapter",
    "train",
]


def test_the_public_names_are_these() -> None:
    assert sorted(ld.__all__) == PUBLIC


def test_every_public_name_exists_and_has_a_docstring() -> None:
    assert [name for name in PUBLIC if not getattr(ld, name).__doc__] == []
    assert set(PUBLIC) <= set(dir(ld))


def test_the_page_of_the_api_has_the_names_and_signatures_of_the_code() -> None:
    assert {name for names in ROOMS.values() for name in names} >= {
        name for name in PUBLIC if not name.endswith("Error")
    }
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tools.api_docs"


def test_a_verb_is_a_function_even_where_a_package_has_the_same_name() -> None:
    # Importing something from the package must not replace the verb by the package.
    for module in ("export.merge", "parity.verdict", "train.config"):
        importlib.import_module(f"loradeploy.{module}")
    assert callable(ld.train)
    assert callable(ld.export)
    assert callable(ld.parity)


def test_assert_parity_is_found_on_the_verb_and_on_the_package() -> None:
    from loradeploy.parity import assert_parity

    assert ld.parity.assert_parity is assert_parity is ld.assert_parity  # type: ignore[attr-defined]


def test_every_error_can_be_caught_by_its_name() -> None:
    tree = set(ld.LoraDeployError.__subclasses__())
    tree |= {below for error in tree for below in error.__subclasses__()}
    own = {error.__name__ for error in tree if error.__module__.startswith("loradeploy.")}
    assert own <= set(PUBLIC)
    assert all(name in (errors.__doc__ or "") for name in own)


def test_the_version_is_that_of_the_distribution() -> None:
    assert ld.__version__ == importlib.metadata.version("loradeploy")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("adapter", "load_adapter"),
        ("adapter", "match_targets"),
        ("bundle.certificate", "digests"),
        ("export.trace", "trace"),
        ("files", "atomic_directory"),
        ("runtime.stacks", "Stacks"),
        ("runtime.timing", "sample_feeds"),
        ("runtime.tokenizer", "PieceDecoder"),
        ("runtime.tokenizer", "Tokenizer"),
    ],
)
def test_names_that_programs_import_from_modules_stay_importable(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(f"loradeploy.{module}"), name)
