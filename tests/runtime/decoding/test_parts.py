"""Long prompts are processed in parts, which does not change the result."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.runtime.decoding.caches import parts
from loradeploy.runtime.decoding.caches.parts import parts_of
from loradeploy.runtime.decoding.caches.rows import CachedRows
from loradeploy.runtime.decoding.graph import DecoderGraph, NewTokens, TokenEmbeds
from loradeploy.runtime.session import AdapterSession
from tests.runtime.feeds import random_ids
from tests.tolerances import tolerance

PROMPT = random_ids(1, 11)
FULL = np.ones_like(PROMPT)


@pytest.fixture(scope="module", params=["grows", "in place"])
def graph(request: pytest.FixtureRequest, llama_adapters: dict[str, Path]) -> DecoderGraph:
    """The decoder graph of a bundle, for each kind of cache, with an adapter."""
    names = {"grows": "tiny_llama_bundle", "in place": "in_place"}
    session = AdapterSession(request.getfixturevalue(names[request.param]))
    session.load("small", llama_adapters["small"])
    return DecoderGraph.of(session, 0)


class Recorded:
    """Runs one row with its adapter and records the number of tokens of each run."""

    def __init__(self, session: AdapterSession, adapter: str | None) -> None:
        self.session, self.adapter = session, adapter
        self.read: list[int] = []

    def take_rows(self, rows: Any, /) -> None:
        raise AssertionError("the rows stay as they are")

    def resident(self, number: int, /) -> None:
        return None

    def run_with_ort_values(self, names: Any, feeds: Any, *, buffers: Any = None) -> Any:
        self.read.append(feeds["input_ids"].shape[1])
        return self.session.run_with_ort_values(
            names, feeds, buffers=buffers, adapters=self.adapter
        )


def read(graph: DecoderGraph, adapter: str | None) -> tuple[Any, list[int]]:
    """Return the logits after the prompt and after one more token, and the tokens of each run."""
    adapters, rows = Recorded(graph.session, adapter), CachedRows(graph, 1)
    found = [rows.read(adapters, NewTokens(PROMPT, FULL, np.array([PROMPT.shape[1] - 1])))]
    found.append(rows.read(adapters, NewTokens.single(PROMPT[:, :1], FULL[:, :1])))
    return np.concatenate(found), adapters.read


def test_a_prompt_in_parts_has_the_logits_of_the_whole_prompt(
    graph: DecoderGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, runs = read(graph, "small")
    assert runs == [11, 1]
    base, _ = read(graph, None)
    assert np.abs(whole - base).max() > 100 * tolerance("rows")
    monkeypatch.setattr(parts, "TOKENS", 4)
    for adapter, expected in (("small", whole), (None, base)):
        found, runs = read(graph, adapter)
        assert runs == [3, 4, 4, 1]
        assert np.abs(found - expected).max() <= tolerance("rows")


def test_parts_have_similar_lengths_within_the_limit_of_a_run(
    graph: DecoderGraph,
) -> None:
    for length in (1, 255, 256, 257, 512, 513, 1000):
        found = parts_of(graph, np.ones((1, length), np.int64))
        sizes = [part.stop - part.start for part in found]
        assert sum(sizes) == length
        assert max(sizes) <= parts.TOKENS
        assert max(sizes) - min(sizes) <= 1
        assert len(found) == -(-length // parts.TOKENS)


def test_graphs_without_a_measured_or_verified_split_process_whole_prompts(
    graph: DecoderGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = np.ones((1, 600), np.int64)
    whole = [slice(0, 600)]
    assert len(parts_of(graph, long)) == 3
    assert parts_of(graph, np.repeat(long, 2, axis=0)) == whole
    padded = long.copy()
    padded[0, 0] = 0
    assert parts_of(graph, padded) == whole
    embeds = TokenEmbeds(1, np.zeros((1, 4), np.float32))
    assert parts_of(graph.with_embeds([embeds]), long) == whole
    manifest = graph.session.manifest
    for other in ({"precision": "int8"}, {"traced": False}, {"task": "seq2seq-lm"}):
        changed: dict[str, Any] = dict(other)
        monkeypatch.setattr(graph.session, "manifest", dataclasses.replace(manifest, **changed))
        assert parts_of(graph, long) == whole, other
