"""A long prompt in parts, which the CPU reads faster than the whole.

A run computes every product of its tokens' queries with the keys of all of them, those that come
later too, which are masked. In parts most of these are not computed, and what a layer makes of a
part stays in the processor's cache: a prompt of 512 tokens of SmolLM2 takes 0.87 of the time
(docs/performance.md). Parity's phase of chunked prefill compares a bundle that reads so.
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

# Tokens of a part at most; of 64 each has too few for the matrix products, and nothing is gained.
TOKENS: Final = 256


def parts_of(graph: DecoderGraph, mask: NDArray[np.int64]) -> list[slice]:
    """The columns of what a run is to read, `mask` [rows, new], as those of one run or several.

    Several are of one row without padding on the CPU, in float32: nothing else was measured. Graphs
    that loradeploy did not trace get it whole: they may turn to other rotations where a text is
    long (Phi-3's of onnxruntime-genai), by the tokens that a run can see, or have a mask for one
    token behind a past. So do embeddings in the places of tokens.
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
