"""Sessions shared by the tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loradeploy.runtime.session import AdapterSession


@pytest.fixture(scope="module", params=["grows", "in place"])
def session(
    request: pytest.FixtureRequest,
    tiny_llama_bundle: Path,
    in_place: Path,
    llama_adapters: dict[str, Path],
) -> Iterator[AdapterSession]:
    with AdapterSession(tiny_llama_bundle if request.param == "grows" else in_place) as session:
        for name, path in llama_adapters.items():
            session.load(name, path)
        yield session
