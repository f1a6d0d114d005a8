"""Runs the requests on an engine that allows one adapter per batch: one batch per adapter."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from tools.bench_serve.load import Tokens, of_run
from tools.timing.alternate import Side

# (prompts, their adapter, number of new tokens) → the generated tokens of each.
Batch = Callable[[Sequence[Tokens], str, int], list[Tokens]]


def one_adapter_a_batch(
    batch: Batch, prompts: list[list[Tokens]], asked: list[list[str]], tokens: int
) -> Side:
    """Return a run of all requests: `prompts` and the adapters `asked`, by client and turn.

    All turns of all clients with the same adapter are one batch. A server would not have so many
    requests at once: this is the best case for such an engine.
    """
    runs = itertools.count()

    def call() -> dict[str, Any]:
        run = next(runs)
        began, used = time.perf_counter(), time.process_time()
        rows = [
            (client, turn, name)
            for client, names in enumerate(asked)
            for turn, name in enumerate(names)
        ]
        answers: dict[tuple[int, int], Tokens] = {}
        for adapter in dict.fromkeys(name for *_, name in rows):
            own = [(client, turn) for client, turn, name in rows if name == adapter]
            found = batch([of_run(prompts[c][t], run) for c, t in own], adapter, tokens)
            answers |= dict(zip(own, found, strict=True))
        made = tokens * len(answers)
        return {
            "speed": made / (time.perf_counter() - began),
            "economy": made / (time.process_time() - used),
            "tokens": [answers[key] for key in sorted(answers)],
        }

    return call
