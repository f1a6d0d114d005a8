"""Process a long prompt in parts, which is faster on the CPU.

A run computes the products of all queries with all keys, including later keys, which are masked. In
parts, most masked products are not computed, and a layer's results for a part stay in the CPU's
caches: a prompt of 512 tokens of SmolLM2 takes 0.87 of the time (docs/performance.md). Parity's
phase of chunked prefill checks bundles that do this.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from loradeploy.adapter.tasks import CAUSAL_LM
from loradeploy.runtime.decoding.caches.memory import on_host

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loradeploy.runtime.decoding.graph import DecoderGraph

# Maximum tokens of a part; with 64, matrix products are too small, and nothing is gained.
TOKENS: Final = 256


def parts_of(graph: DecoderGraph, mask: NDArray[np.int64]) -> list[slice]:
    """Split the columns of `mask` [rows, new] into those of one run or several.

    Several only for one row without padding on the CPU in float32: nothing else was measured.
    Graphs that loradeploy did not trace get the whole prompt: they may choose other rotary
    embeddings for long texts (Phi-3's of onnxruntime-genai) by the number of tokens in a run, or
    support only one token after a past. Embeddings that replace tokens also require the whole
    prompt.
    """
    rows, new = mask.shape
    manifest = graph.session.manifest
    whole = (
        new <= TOKENS
        or rows != 1
        or not mask.all()
        or bool(graph.embeds)
        or manifest.task != CAUSAL_LM
        or manifest.precision != "fp32"
        or not manifest.traced
        or not on_host(graph.session)
    )
    count = 1 if whole else -(-new // TOKENS)
    ends = [new * part // count for part in range(count + 1)]
    return [slice(begin, end) for begin, end in itertools.pairwise(ends)]
