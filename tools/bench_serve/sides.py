"""loradeploy's sides of bench_serve: asyncio clients of an engine, or over HTTP."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import onnxruntime

import loradeploy as ld
from tools.bench_serve.load import Tokens, of_run
from tools.timing.alternate import Side, serve_worker

LAST: Final = -1
Ask = Callable[[Tokens, str], AsyncIterator[str]]


@dataclass
class RunReport:
    """One run of all clients.

    `speed`: tokens per second. `first`: seconds to the first token of each request. `between`:
    seconds between two tokens of a request. `outside`: the part of the time in which the graph did
    not run; None if unknown. `economy`: tokens per second of processor time of the process, which
    depends less on other work on the machine than `speed`.
    `texts`: by client and turn; a side without loradeploy's tokenizer returns `tokens` instead.
    """

    speed: float
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    outside: float | None = None
    economy: float | None = None
    texts: list[str] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)


def percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the 50th and the 99th percentile in milliseconds."""
    ordered = sorted(seconds) or [float("nan")]

    def at(part: float) -> float:
        return 1000 * ordered[min(len(ordered) - 1, int(part * len(ordered)))]

    return at(0.5), at(0.99)


class GraphTime:
    """Measures the seconds in which graphs run in this process, from now on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        run = onnxruntime.InferenceSession.run_with_iobinding

        def timed(session: Any, *arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return run(session, *arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began

        onnxruntime.InferenceSession.run_with_iobinding = timed


async def run_clients(
    prompts: Sequence[Sequence[Tokens]],
    asked: Sequence[Sequence[str]],
    ask: Ask,
    tokens: int,
    graph: GraphTime,
) -> RunReport:
    """Run all clients concurrently; each sends its requests in turn."""
    report = RunReport(0.0)
    texts: dict[tuple[int, int], str] = {}

    async def client(number: int) -> None:
        for turn, (prompt, adapter) in enumerate(zip(prompts[number], asked[number], strict=True)):
            began = last = time.perf_counter()
            pieces: list[str] = []
            async for piece in ask(prompt, adapter):
                now = time.perf_counter()
                (report.between if pieces else report.first).append(now - last)
                last = now
                pieces.append(piece)
            assert last > began, "a request without a token"
            texts[number, turn] = "".join(pieces)

    before, began, used = graph.seconds, time.perf_counter(), time.process_time()
    await asyncio.gather(*(client(number) for number in range(len(prompts))))
    whole = time.perf_counter() - began
    report.speed = tokens * len(texts) / whole
    report.economy = tokens * len(texts) / (time.process_time() - used)
    report.outside = 1 - (graph.seconds - before) / whole
    report.texts = [texts[key] for key in sorted(texts)]
    return report


def served(
    bundle: str,
    adapters: Mapping[str, str],
    prompts: list[list[Tokens]],
    asked: list[list[str]],
    tokens: int,
    ends: Sequence[int],
    http: bool = False,
    room: int | None = None,
    operator: str | None = None,
) -> Side:
    """Return a run of all clients.

    `room`: number of adapters that fit in memory; None: all. `operator`: the operator's library.
    """
    graph = GraphTime()
    budget = None if room is None else room * bytes_of(bundle, next(iter(adapters.values())))
    session = ld.AdapterSession(bundle, host_budget=budget, operator=operator)
    for name, path in adapters.items():
        session.register(name, path)
    barred: dict[int | str, float] = dict.fromkeys(ends, -100.0)
    if http:
        ask = ask_url(started_server(session, len(prompts)), tokens, barred)
    else:
        ask = ask_engine(ld.Engine(session, max_rows=len(prompts)).start(), tokens, barred)
    runs = itertools.count()

    def call() -> dict[str, Any]:
        run = next(runs)
        of_this = [[of_run(prompt, run) for prompt in own] for own in prompts]
        return asdict(asyncio.run(run_clients(of_this, asked, ask, tokens, graph)))

    return call


def bytes_of(bundle: str, adapter: str) -> int:
    """Return the size of an adapter in memory."""
    with ld.AdapterSession(bundle) as session:
        session.load("one", adapter)
        return session.statistics.host_bytes


def ask_engine(engine: ld.Engine, tokens: int, barred: Mapping[int | str, float]) -> Ask:
    """Return a function that sends a request to an engine, without the tokens `barred`."""

    async def ask(prompt: Tokens, adapter: str) -> AsyncIterator[str]:
        submission = engine.submit(prompt, adapter, max_new_tokens=tokens, logit_bias=barred)
        async for event in submission:
            if event.token_ids:
                yield event.text

    return ask


def started_server(session: ld.AdapterSession, rows: int, waiting: int = 64) -> str:
    """Start a server in a thread of this process, and return its URL."""
    from loradeploy.serve.http.server import Server, listen, url_of
    from loradeploy.serve.service import Service
    from loradeploy.serve.settings import ServeLimits

    service = Service(session, limits=ServeLimits(max_rows=rows, max_waiting=waiting))
    server, listening, ready = Server(service), listen("127.0.0.1", 0), threading.Event()
    threading.Thread(target=server.serve_on, args=(listening, ready.set), daemon=True).start()
    ready.wait()
    return url_of(listening)


def ask_url(url: str, tokens: int, barred: Mapping[int | str, float]) -> Ask:
    """Like `ask_engine`, over HTTP with streaming."""
    import httpx

    bias = {str(token): value for token, value in barred.items()}

    async def ask(prompt: Tokens, adapter: str) -> AsyncIterator[str]:
        body = {
            "model": adapter,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "logit_bias": bias,
        }
        async with (
            # verify=False: reading the certificates for TLS would take longer than a token.
            httpx.AsyncClient(base_url=url, timeout=600, verify=False, trust_env=False) as client,
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code}: {(await answer.aread())[:200]!r}")
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line.removeprefix("data: "))["choices"]
                    if choices and choices[0]["text"]:
                        yield choices[0]["text"]

    return ask


if __name__ == "__main__":
    serve_worker({"served": served}, warm_up=1)
