"""Measures the processor time of an engine's step, inside onnxruntime's run and outside of it.

Processor time depends little on other work on the machine. onnxruntime has one thread, so that the
time outside of a run is that of the engine, the server and Python. Only steps in which all rows are
active are counted; HTTP clients are in a separate process.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnxruntime

import loradeploy as ld
from loradeploy.runtime.decoding.loop import DecodingBatch
from tools.bench_serve.load import Tokens
from tools.bench_serve.sides import Ask, ask_engine, ask_url, started_server
from tools.timing.alternate import Ratio, Side, Worker, serve_worker


@dataclass(frozen=True)
class StepCost:
    """Milliseconds of processor time of a step: in onnxruntime's run, and outside of it."""

    graph: float
    rest: float

    @property
    def share(self) -> float:
        """The share of the step's time that is outside of the run."""
        return self.rest / (self.graph + self.rest)


class StepClock:
    """Records before each step the processor time used so far, in total and in runs.

    Steps are delayed until the batch has `rows` rows.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.together = False
        self.graph = 0.0
        self.notes: list[tuple[int, float, float]] = []  # rows, total time, time in runs
        run = onnxruntime.InferenceSession.run_with_iobinding
        step = DecodingBatch.step

        def timed(session: Any, *arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return run(session, *arguments, **options)
            finally:
                self.graph += time.thread_time() - began

        def noted(batch: DecodingBatch) -> None:
            self.together = self.together or batch.rows == self.rows
            if not self.together:
                time.sleep(0.001)
                return
            self.notes.append((batch.rows, time.process_time(), self.graph))
            step(batch)

        onnxruntime.InferenceSession.run_with_iobinding = timed
        DecodingBatch.step = noted  # type: ignore[method-assign, assignment]

    def cost(self) -> StepCost:
        """Return the mean cost of the steps with all rows since the last call."""
        notes, self.notes, self.together = self.notes, [], False
        full = [number for number, (count, *_) in enumerate(notes) if count == self.rows]
        first, last = full[0], full[-1]
        assert len(full) == last - first + 1 > 1, "the steps of all rows follow each other"
        steps = last - first
        whole = 1000 * (notes[last][1] - notes[first][1]) / steps
        graph = 1000 * (notes[last][2] - notes[first][2]) / steps
        return StepCost(graph, whole - graph)


def costed(
    bundle: str,
    adapters: Mapping[str, str],
    prompts: list[Tokens],
    asked: list[str],
    tokens: int,
    ends: Sequence[int],
    http: bool = False,
) -> Side:
    """Return a run that generates after all prompts together and reports the cost of a step."""
    rows = len(prompts)
    clock = StepClock(rows)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = ld.AdapterSession(bundle, session_options=options)
    for name, path in adapters.items():
        session.register(name, path)
    barred: dict[int | str, float] = dict.fromkeys(ends, -100.0)
    if http:
        url = started_server(session, rows)
        given = json.dumps([url, prompts, asked, tokens, list(ends)])
    else:
        ask = ask_engine(ld.Engine(session, max_rows=rows).start(), tokens, barred)

    def call() -> dict[str, Any]:
        if http:
            clients = [sys.executable, "-m", "tools.bench_serve.costs", "--clients"]
            subprocess.run(clients, input=given, text=True, check=True)
        else:
            asyncio.run(_all(ask, prompts, asked))
        return asdict(clock.cost())

    return call


async def _all(ask: Ask, prompts: Sequence[Tokens], asked: Sequence[str]) -> None:
    async def one(prompt: Tokens, adapter: str) -> None:
        async for _ in ask(prompt, adapter):
            pass

    await asyncio.gather(*map(one, prompts, asked))


def measure_costs(
    given: Mapping[str, Any], rows: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Measure the cost of a step in the engine and over HTTP, for each number of rows."""
    found = []
    for count in rows:
        own = {**given, "prompts": given["prompts"][:count], "asked": given["asked"][:count]}
        for side in ("engine", "http"):
            worker = Worker("tools.bench_serve.costs", "costed", {**own, "http": side == "http"})
            try:
                taken = [StepCost(**one) for one in worker.results(rounds)]
            finally:
                worker.close()
            low, middle, high = statistics.quantiles(
                [one.share for one in taken], n=4, method="inclusive"
            )
            found.append(
                {
                    "rows": count,
                    "side": side,
                    "graph_ms": statistics.median(one.graph for one in taken),
                    "rest_ms": statistics.median(one.rest for one in taken),
                    "share": {"median": middle, "low": low, "high": high},
                }
            )
    return found


def cost_markdown(report: Mapping[str, Any]) -> str:
    """Return the costs as a table."""
    lines = [
        "| rows | side | processor ms in the run | outside of it, ms | share (quartiles) |",
        "|---|---|---|---|---|",
    ]
    for row in report["costs"]:
        lines.append(
            f"| {row['rows']} | {row['side']} | {row['graph_ms']:.2f} | {row['rest_ms']:.2f} |"
            f" {Ratio(**row['share'])} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--clients"]:
        url, prompts, asked, tokens, ends = json.loads(sys.stdin.read())
        asyncio.run(_all(ask_url(url, tokens, dict.fromkeys(ends, -100.0)), prompts, asked))
    else:
        serve_worker({"costed": costed}, warm_up=1)
