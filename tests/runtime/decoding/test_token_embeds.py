"""Embeddings as inputs instead of tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.errors import UsageError
from loradeploy.runtime.decoding.graph import DecoderGraph, TokenEmbeds, check_embeds


def test_embeddings_are_refused_where_the_graph_has_no_input_for_them(
    tiny_llama_bundle: Path,
) -> None:
    graph = DecoderGraph.of(ld.AdapterSession(tiny_llama_bundle), pad_id=0)
    embeds = TokenEmbeds(7, np.ones((1, 64), np.float32))
    with pytest.raises(UsageError, match="this bundle takes no embeddings instead of tokens"):
        check_embeds(graph, [3, 7], embeds, "prompt 1")
    # Rows that have ended are not processed again, so their values do not matter.
    with pytest.raises(UsageError, match="need a graph with a cache"):
        check_embeds(dataclasses.replace(graph, cached=False), [3, 7], embeds, "prompt 1")
    check_embeds(graph, [3, 7], None, "prompt 1")


def test_grids_do_not_change_the_positions_of_other_decoders(
    tiny_llama_bundle: Path,
) -> None:
    graph = DecoderGraph.of(ld.AdapterSession(tiny_llama_bundle), pad_id=0)
    embeds = TokenEmbeds(7, np.ones((6, 64), np.float32), grids=((2, 3),))
    assert graph.with_embeds([embeds, None]).shifts(2).tolist() == [0, 0]
