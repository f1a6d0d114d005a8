"""Fixtures of the export tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import once
from tests.export.adapters.vocabularies import CASES, make


@pytest.fixture(scope="session")
def bases(
    tiny_llama: Path, tiny_gpt2: Path, tiny_llama_bundle: Path, tiny_gpt2_bundle: Path
) -> dict[str, tuple[Path, Path]]:
    return {"llama": (tiny_llama, tiny_llama_bundle), "gpt2": (tiny_gpt2, tiny_gpt2_bundle)}


@pytest.fixture(scope="session")
def adapter_of(shared: Path, bases: dict[str, tuple[Path, Path]]) -> Callable[[str], Path]:
    def of(name: str) -> Path:
        case = CASES[name]
        place = shared / "vocabularies" / name.replace(" ", "-").replace(",", "")
        return once(place, lambda partial: make(case, bases[case.model][0], partial))

    return of
