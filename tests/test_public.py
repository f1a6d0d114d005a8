"""The names that users import: adding one is a decision, taking one away breaks them."""

from __future__ import annotations

import importlib
import importlib.metadata

import loradeploy as ld

PUBLIC = [
    "Adapter",
    "AdapterConfig",
    "AdapterSession",
    "LoraDeployError",
    "TextClassifier",
    "TextEmbedder",
    "TextGenerator",
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


def test_every_public_name_is_there_with_its_docstring() -> None:
    assert [name for name in PUBLIC if not getattr(ld, name).__doc__] == []
    assert set(PUBLIC) <= set(dir(ld))


def test_a_verb_is_a_function_though_a_package_has_its_name() -> None:
    # Whoever imports something out of the package must not turn the verb into the package.
    for module in ("export.precision", "parity.verdict", "train.config"):
        importlib.import_module(f"loradeploy.{module}")
    assert callable(ld.train)
    assert callable(ld.export)
    assert callable(ld.parity)


def test_the_version_is_that_of_the_distribution() -> None:
    assert ld.__version__ == importlib.metadata.version("loradeploy")
