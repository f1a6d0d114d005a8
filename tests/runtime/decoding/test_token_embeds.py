"""Embeddings that are read instead of tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import loradeploy as ld
from loradeploy.errors import UsageError
from loradeploy.runtime.decoding.graph import DecoderGraph, TokenEmbeds, check_embeds


def test_embeddings_are_refused_where_the_graph_cannot_read_them(tiny_llama_bundle: Path) -> None:
    graph = DecoderGraph.of(ld.AdapterSession(tiny_llama_bundle), pad_id=0)
    embeds = TokenEmbeds(7, np.ones((1, 64), np.float32))
    with pytest.raises(UsageError, match="this bundle takes no embeddings in the places"):
        check_embeds(graph, [3, 7], embeds, 0)
    # Rows that have ended are not read again, so that their numbers say nothing.
    with pytest.raises(UsageError, match="need a graph with a cache"):
        check_embeds(dataclasses.replace(graph, cached=False), [3, 7], embeds, 0)
    check_embeds(graph, [3, 7], None, 0)


def test_grids_move_no_positions_of_a_decoder_that_does_not_count_in_them(
    tiny_llama_bundle: Path,
) -> None:
    graph = DecoderGraph.of(ld.AdapterSession(tiny_llama_bundle), pad_id=0)
    embeds = TokenEmbeds(7, np.ones((6, 64), np.float32), grids=((2, 3),))
    assert graph.with_embeds([embeds, None]).shifts(2).tolist() == [0, 0]
