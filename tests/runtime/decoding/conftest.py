"""Text generators on the tiny Llama with each kind of cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator

PROMPTS = ["The government said", "A", "Shares in the company fell after the bank reported that"]


@pytest.fixture(scope="module")
def generators(
    tiny_llama_bundle: Path, in_place: Path, llama_adapters: dict[str, Path]
) -> dict[str, TextGenerator]:
    """A generator with a growing cache and one with a cache of fixed size, adapters loaded."""
    made = {}
    for way, bundle in (("grows", tiny_llama_bundle), ("in place", in_place)):
        session = AdapterSession(bundle)
        for name, path in llama_adapters.items():
            session.load(name, path)
        made[way] = TextGenerator(session)
    return made
