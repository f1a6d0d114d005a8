"""Statistics of an engine, for a metrics page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from loradeploy.runtime.engine.submission import Submission

# Durations in seconds that an observer is called with.
Moment = Literal[
    "queue",  # from submit until the request is admitted
    "first_token",  # from submit until its first token
    "inter_token",  # from an event with tokens to the next one
    "request",  # from submit until its end, if it succeeded
    "step",  # one decoding run of the graph
    "prefill",  # one run of the graph on a part of a prompt, or on several prompts
]
# Called in the engine's thread, so it should be fast. The submission is None for "step", and for
# "prefill" of several prompts.
Observer = Callable[[Moment, float, "Submission | None"], None]


@dataclass
class EngineStatistics:
    """Statistics of an engine since it was started.

    Args:
        waiting: requests that are waiting.
        running: requests that are decoding or whose prompt is being processed.
        rows: rows of the next step.
        slots: maximum number of rows.
        submitted: requests that were accepted.
        refused: requests that were refused because too many were waiting.
        finished: requests that completed, by finish_reason of each text.
        failed: requests that failed, by the name of their error.
        prompt_tokens: processed prompt tokens, including those found in the prefix cache.
        cached_tokens: prompt tokens that were found there.
        generated_tokens: tokens that were generated.
        steps: decoding runs of the graph.
        one_adapter_steps: steps in which all rows had the same adapter, or the base.
        batch_sizes: number of steps by number of active rows.
        prefills: runs of the graph that processed a part of a prompt, or several prompts.
        prefix_entries: blocks of tokens in the prefix cache.
        prefix_bytes: size of these blocks.
        prefix_evictions: blocks that were evicted.
        cache_bytes: maximum size of the rows' keys and values.
    """

    waiting: int = 0
    running: int = 0
    rows: int = 0
    slots: int = 0
    submitted: int = 0
    refused: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    one_adapter_steps: int = 0
    batch_sizes: Counter[int] = field(default_factory=Counter)
    prefills: int = 0
    prefix_entries: int = 0
    prefix_bytes: int = 0
    prefix_evictions: int = 0
    cache_bytes: int = 0
