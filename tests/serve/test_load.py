"""Under load, each request gets what it gets alone, whatever else is in the batch."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai

from loradeploy.files import _exchange
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.serve.conftest import serving

BASE = "bundle-llama"
PROMPTS = ["Shares rose", "The striker scored twice before half time", "A"]
REQUESTS = 48


def test_concurrent_requests_get_what_they_get_alone(
    tiny_llama_bundle: Path, serve_adapters: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    for name in ("sport", "topic"):
        shutil.copytree(serve_adapters[name], root / name)
    shutil.copytree(serve_adapters["headline"], root / "moving")
    (root / "broken").mkdir()
    (root / "broken" / "adapter_config.json").write_text("{}")
    session = AdapterSession(tiny_llama_bundle)
    for name, path in serve_adapters.items():
        session.load(name, path)
    generator = TextGenerator(session)
    alone: dict[tuple[str | None, str, int], str] = {}
    for name in (None, *serve_adapters):
        for seed in (0, 1):  # greedy, and sampled
            options: dict[str, Any] = {"temperature": 1.2, "seed": 1} if seed else {}
            found = generator.generate(PROMPTS, name, max_new_tokens=10, **options)
            for prompt, answer in zip(PROMPTS, found, strict=True):
                alone[name, prompt, seed] = answer.text
    assert len(set(alone.values())) == len(alone)

    order = random.Random(3)
    kinds = [BASE, "sport", "topic", "moving", "broken", "gone"]
    jobs = [(kinds[n % 6], order.choice(PROMPTS), n % 2, n % 3 == 0) for n in range(REQUESTS)]
    order.shuffle(jobs)
    # All of memory is for two adapters at a time.
    budget = 2 * max(resident_bytes(session, name) for name in serve_adapters) + 1
    with serving(tiny_llama_bundle, root=root, max_rows=4, host_budget=budget) as running:
        client = running.client()

        def answer(job: tuple[str, str, int, bool]) -> None:
            model, prompt, seed, stream = job
            sampled = {"temperature": 1.2, "seed": 1} if seed else {"temperature": 0}
            body: dict[str, Any] = {"prompt": prompt, "max_tokens": 10, **sampled}
            if model == "gone":  # the client is, after the first piece
                with httpx.stream(
                    "POST",
                    f"{running.url}/v1/completions",
                    json={"model": "topic", "stream": True, **body},
                    timeout=60,
                ) as found:
                    next(found.iter_raw())
                return
            try:
                made = client.completions.create(model=model, stream=stream, **body)
            except openai.InternalServerError as refused:
                # Files that changed while they were read are refused as well.
                assert model in ("broken", "moving")
                assert refused.status_code == 503
                return
            assert model != "broken"
            pieces = made if stream else [made]
            text = "".join(piece.choices[0].text for piece in pieces)
            adapters = {BASE: [None], "moving": ["headline", "sport"]}.get(model, [model])
            assert text in [alone[name, prompt, seed] for name in adapters], job

        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(answer, job) for job in jobs]
            for number in range(4):  # another adapter under the same name, and back
                asked[number * 10].result()
                replace(root / "moving", serve_adapters[["sport", "headline"][number % 2]])
            for one in asked:
                one.result()
        replace(root / "moving", serve_adapters["sport"])
        answer_now = client.completions.create(
            model="moving", prompt=PROMPTS[0], max_tokens=10, temperature=0
        )
        assert answer_now.choices[0].text == alone["sport", PROMPTS[0], 0]
        assert running.service.engine is not None
        running.service.engine.drain(60)
        stats = running.service.engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert sum(stats.finished.values()) + sum(stats.failed.values()) == stats.submitted


def replace(place: Path, adapter: Path) -> None:
    """Put another adapter there: first a whole copy, then one name for another."""
    fresh = place.with_name(".fresh")
    shutil.copytree(adapter, fresh)
    _exchange(fresh, place)
    shutil.rmtree(fresh)


def resident_bytes(session: AdapterSession, name: str) -> int:
    """What an adapter takes in memory."""
    digest = session.adapters[name]
    return int(session._bank._residents[digest].nbytes)
