"""Measures the figures of one node, and the throughput of two replicas, on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

import httpx

from loradeploy.runtime.session import AdapterSession
from tools.simulate_serving.model import Figures, Load, Outcome, hashed, quantile

_TOKENS: Final = 33
_REPEATS: Final = 5


@contextmanager
def server(bundle: str, adapters: dict[str, str], rows: int) -> Iterator[tuple[str, float]]:
    """Run `loradeploy serve` in a process; yield its URL, and the seconds that it took to start."""
    line = [sys.executable, "-m", "loradeploy", "serve", bundle, "--port", "0", "--json"]
    for name, path in adapters.items():
        line += ["--adapter", f"{name}={path}"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*line, "--max-rows", str(rows)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        text = ""
        while not text.rstrip().endswith("}") or json_of(text) is None:
            part = process.stdout.readline().decode()
            if not part:
                raise RuntimeError("the server has ended")
            text += part
        values = json_of(text) or {}
        yield str(values["url"]), time.perf_counter() - begin
    finally:
        process.terminate()
        process.wait(60)


def json_of(text: str) -> dict[str, Any] | None:
    """Return the JSON object in `text`; None if it is incomplete."""
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError:
        return None
    return found


def ask(http: httpx.Client, model: str, prompt: Sequence[int], tokens: int) -> float:
    """Send a request for exactly `tokens` tokens, and return its seconds."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "logit_bias": {"0": -1000, "1": -1000, "2": -1000},
    }
    begin = time.perf_counter()
    answer = http.post("/v1/completions", json=body)
    answer.raise_for_status()
    if answer.json()["usage"]["completion_tokens"] != tokens:
        raise RuntimeError("a text ended early: the figures would be wrong")
    return time.perf_counter() - begin


def measured(
    bundle: str,
    adapters: dict[str, str],
    rows: int,
    prompts: tuple[int, int],
    *,
    nodes: int = 1,
) -> Figures:
    """Measure the figures of a node with `adapters`, by requests over HTTP.

    `prompts`: two prompt lengths; the time per prompt token is derived from their difference.
    `nodes`: number of nodes that are busy at the same time, if they share a machine.
    """
    load, rank_bytes = _adapter_figures(bundle, adapters)
    names = list(adapters)
    with ExitStack() as stack:
        servers = [stack.enter_context(server(bundle, adapters, rows)) for _ in range(nodes)]
        https = [stack.enter_context(httpx.Client(base_url=url, timeout=600)) for url, _ in servers]
        fresh = iter(range(10**6))  # different prompts, so that the prefix cache is not used

        def together(models: Sequence[str], tokens: int, length: int = prompts[0]) -> float:
            """Send a request for each model to each node; return the mean seconds of a request."""
            jobs = [(http, model) for model in models for http in https]

            def one(job: tuple[httpx.Client, str]) -> float:
                return ask(job[0], job[1], _prompt(next(fresh), length), tokens)

            with ThreadPoolExecutor(len(jobs)) as pool:
                return sum(pool.map(one, jobs)) / len(jobs)

        def per_step(models: Sequence[str]) -> float:
            together(models, 2)
            pairs = [(together(models, _TOKENS), together(models, 1)) for _ in range(_REPEATS)]
            rest = median(pair[0] for pair in pairs) - median(pair[1] for pair in pairs)
            return max(rest / (_TOKENS - 1), 1e-6)

        counts = sorted({1, 2, max(rows // 2, 1), rows})
        step = {count: per_step([names[0]] * count) for count in counts}
        several = per_step([names[n % len(names)] for n in range(rows)])
        short, long = (
            median(together(names[:1], 1, length) for _ in range(2 * _REPEATS))
            for length in prompts
        )
        request = median(_nothing(https[0]) for _ in range(2 * _REPEATS))
    token = max((long - short) / (prompts[1] - prompts[0]), 0.0)
    alone = max(short - token * prompts[0] - request, 0.0)
    # Several adapters cannot be faster than one: a smaller ratio is noise.
    mixed = max(several / step[rows], 1.0)
    return Figures(step, mixed, (alone, token), request, load, rank_bytes, servers[0][1])


def _prompt(number: int, length: int) -> list[int]:
    return [3 + number % 200, 3 + number // 200 % 200, *[5] * (length - 2)]


def _nothing(http: httpx.Client) -> float:
    begin = time.perf_counter()
    http.get("/v1/models")
    return time.perf_counter() - begin


def _adapter_figures(bundle: str, adapters: dict[str, str]) -> tuple[tuple[float, float], float]:
    """Return the seconds to load an adapter (constant, per byte), and the bytes per rank."""
    times, sizes, ranks = [], [], []
    with AdapterSession(bundle) as session:
        before = 0
        for name, path in adapters.items():
            begin = time.perf_counter()
            session.load(name, path)
            times.append(time.perf_counter() - begin)
            sizes.append(session.statistics.host_bytes - before)
            before = session.statistics.host_bytes
            ranks.append(json.loads((Path(path) / "adapter_config.json").read_text())["r"])
    per_byte = median(times) / max(median(sizes), 1)
    return (0.0, per_byte), median(size / rank for size, rank in zip(sizes, ranks, strict=True))


def two_replicas(bundle: str, adapters: dict[str, str], rows: int, load: Load) -> Outcome:
    """Run the clients of `load` on two servers; each adapter is assigned to one of them."""
    names = list(adapters)
    with ExitStack() as stack:
        urls = [stack.enter_context(server(bundle, adapters, rows))[0] for _ in range(2)]
        https = [stack.enter_context(httpx.Client(base_url=url, timeout=600)) for url in urls]
        order = iter(_order(load))
        whole: list[float] = []

        def client(number: int) -> None:
            for place, adapter in order:
                http = https[hashed(adapter, len(https))]
                prompt = _prompt(place, load.prompt)
                whole.append(ask(http, names[adapter], prompt, load.output))

        for http in https:
            ask(http, names[0], [4] * load.prompt, 2)
        begin = time.perf_counter()
        with ThreadPoolExecutor(load.clients) as pool:
            list(pool.map(client, range(load.clients)))
        seconds = time.perf_counter() - begin
    tokens = load.output * len(whole)
    return Outcome(seconds, tokens, [], [], whole, 0, 0, float("nan"))


def _order(load: Load) -> list[tuple[int, int]]:
    import random

    chance = random.Random(load.seed)
    chosen = chance.choices(range(load.adapters), load.popularity, k=load.requests)
    return list(enumerate(chosen))


def compared(real: Outcome, again: Outcome, simulated: Outcome) -> dict[str, float]:
    """Return throughput and median times of two runs and of the simulation, and their ratios."""
    rates = {"measured": real.rate, "measured again": again.rate, "simulated": simulated.rate}
    runs = {"measured": real, "measured again": again, "simulated": simulated}
    times = {name: quantile(one.whole, 0.5) for name, one in runs.items()}
    return {
        **{f"{name}, tokens/s": rate for name, rate in rates.items()},
        **{f"{name}, seconds": seconds for name, seconds in times.items()},
        "simulated / measured, tokens/s": 2 * simulated.rate / (real.rate + again.rate),
        "control: measured again / measured": again.rate / real.rate,
    }
