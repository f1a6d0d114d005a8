"""Sessions on the tiny bundles, with adapters of several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from tests.conftest import MakeAdapter, once

RANKS = {"small": 4, "large": 64, "partial": 8}


@pytest.fixture(scope="session")
def llama_adapters(tiny_llama: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    """Adapters for the tiny Llama: rank 4, rank 64, and rank 8 on only two kinds of modules."""
    return {
        name: make_adapter(
            tiny_llama,
            r=rank,
            alpha=2 * rank,
            seed=rank,
            target_modules=["q_proj", "down_proj"] if name == "partial" else "all-linear",
        )
        for name, rank in RANKS.items()
    }


@pytest.fixture(scope="session")
def bert_adapters(tiny_bert: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    """Adapters for the tiny BERT with their own heads, and one without."""
    adapters = {
        name: make_adapter(
            tiny_bert,
            r=rank,
            seed=rank,
            task="sequence-classification",
            modules_to_save=["classifier"],
        )
        for name, rank in (("small", 4), ("large", 16))
    }
    adapters["headless"] = make_adapter(
        tiny_bert,
        r=4,
        seed=9,
        task="feature-extraction",
        target_modules=["query", "value"],
    )
    return adapters


@pytest.fixture(scope="session")
def in_place(tiny_llama_bundle: Path, shared: Path) -> Path:
    """The tiny Llama with a cache of fixed size, and one slot of side inputs per row."""
    return once(
        shared / "bundle-llama-in-place",
        lambda place: export(tiny_llama_bundle, place, attention="gqa", layout="rows"),
    )


@pytest.fixture
def llama_session(tiny_llama_bundle: Path, llama_adapters: dict[str, Path]) -> AdapterSession:
    """A new session on the tiny Llama with its adapters loaded."""
    session = AdapterSession(tiny_llama_bundle)
    for name, path in llama_adapters.items():
        session.load(name, path)
    return session
