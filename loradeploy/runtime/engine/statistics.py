"""What an engine did and has available: figures for a page of metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from loradeploy.runtime.engine.submission import Submission

# What an observer is told of, each with its seconds.
Moment = Literal[
    "queue",  # from the call of submit until the request takes part in steps
    "first_token",  # from the call of submit until its first token
    "inter_token",  # from a token of a text to its next
    "request",  # from the call of submit until its end, when it was well
    "step",  # one run of the graph that decodes
    "prefill",  # one run of the graph that reads a part of a prompt, or several prompts
]
# Called in the engine's thread: it should be quick. The submission is None for
# "step", and for "prefill" where several prompts are read.
Observer = Callable[[Moment, float, "Submission | None"], None]


@dataclass
class EngineStatistics:
    """Statistics of an engine since it was started.

    Args:
        waiting: requests that wait.
        running: requests that are decoding or whose prompt is being processed.
        rows: rows of the next step.
        slots: maximum number of rows.
        submitted: requests that were accepted.
        refused: requests that were refused because too many were waiting.
        finished: requests that completed, by finish_reason of each text.
        failed: requests that failed, by the name of their error.
        prompt_tokens: processed prompt tokens, including those found in the prefix cache.
        cached_tokens: those that were found there.
        generated_tokens: tokens that were generated.
        steps: runs of the graph that decoded.
        one_adapter_steps: those in which all rows had the same adapter, or the base.
        batch_sizes: number of steps by number of active rows.
        prefills: runs of the graph that processed a part of a prompt, or several prompts.
        prefix_entries: blocks of tokens in the prefix cache.
        prefix_bytes: their bytes.
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
