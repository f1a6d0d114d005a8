"""Under load, each request gets the same text as alone."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from safetensors.numpy import load_file, save_file

from loradeploy.files import _exchange
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.serve.conftest import serving

BASE = "bundle-llama"
PROMPTS = ["Shares rose", "The striker scored twice before half time", "A"]
ADAPTERS = 32
REQUESTS = 60
TOKENS = 5


@pytest.fixture(scope="module")
def many(
    serve_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """32 adapters of three ranks with independent random updates."""
    place = tmp_path_factory.mktemp("many")
    sources = list(serve_adapters.values())
    made = {}
    for number in range(ADAPTERS):
        made[f"a{number}"] = target = place / f"a{number}"
        shutil.copytree(sources[number % len(sources)], target)
        file = target / "adapter_model.safetensors"
        chance = np.random.default_rng(number)
        arrays = load_file(file)
        save_file(
            {
                name: values * chance.choice(np.float32([-1, 1]), values.shape)
                for name, values in arrays.items()
            },
            file,
        )
    return made


def test_concurrent_requests_get_the_same_text_as_alone(
    tiny_llama_bundle: Path,
    serve_adapters: dict[str, Path],
    many: dict[str, Path],
    tmp_path: Path,
) -> None:
    root = tmp_path / "root"
    for name, path in many.items():
        shutil.copytree(path, root / name)
    shutil.copytree(serve_adapters["headline"], root / "moving")
    (root / "broken").mkdir()
    (root / "broken" / "adapter_config.json").write_text("{}")
    order = random.Random(3)
    others = [BASE, "moving", "broken", "gone"]
    kinds = [*many, *others * 4, *many]
    jobs = [
        (kinds[n % len(kinds)], order.choice(PROMPTS), n // 2 % 2, n % 3 == 0)
        for n in range(REQUESTS)
    ]
    order.shuffle(jobs)
    session = AdapterSession(tiny_llama_bundle)
    for name, path in (many | serve_adapters).items():
        session.load(name, path)
    generator = TextGenerator(session)

    @cache
    def alone(name: str | None, prompt: str, seed: int) -> str:
        """Return the text of a request alone, greedy or sampled."""
        options: dict[str, Any] = {"temperature": 1.2, "seed": 1} if seed else {}
        return generator.generate([prompt], name, max_new_tokens=TOKENS, **options)[0].text

    # Room for four of more than thirty adapters.
    budget = 4 * max(resident_bytes(session, name) for name in serve_adapters) + 1
    with serving(tiny_llama_bundle, root=root, max_rows=4, host_budget=budget) as running:
        client = running.client()

        texts: dict[tuple[str, str, int, bool], str] = {}

        def answer(job: tuple[str, str, int, bool]) -> None:
            model, prompt, seed, stream = job
            sampled = {"temperature": 1.2, "seed": 1} if seed else {"temperature": 0}
            body: dict[str, Any] = {"prompt": prompt, "max_tokens": TOKENS, **sampled}
            if model == "gone":  # a client that disconnects after the first piece
                with httpx.stream(
                    "POST",
                    f"{running.url}/v1/completions",
                    json={"model": "a0", "stream": True, **body},
                    timeout=60,
                ) as found:
                    next(found.iter_raw())
                return
            try:
                made = client.completions.create(model=model, stream=stream, **body)
            except openai.InternalServerError as refused:
                # Files that changed while they were read are refused too.
                assert model in ("broken", "moving")
                assert refused.status_code == 503
                return
            assert model != "broken"
            pieces = made if stream else [made]
            text = "".join(piece.choices[0].text for piece in pieces)
            texts[job] = text

        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(answer, job) for job in jobs]
            for number in range(4):  # replaces the adapter, and restores it
                asked[number * 10].result()
                replace(root / "moving", serve_adapters[["sport", "headline"][number % 2]])
            for one in asked:
                one.result()
        for (model, prompt, seed, _), text in texts.items():
            adapters = {BASE: [None], "moving": ["headline", "sport"]}.get(model, [model])
            assert text in [alone(name, prompt, seed) for name in adapters], model
        assert {model for model, *_ in texts} >= {BASE, "moving", *many}
        assert len({alone(name, PROMPTS[0], 0) for name in many}) > 0.9 * ADAPTERS
        replace(root / "moving", serve_adapters["sport"])
        answer_now = client.completions.create(
            model="moving", prompt=PROMPTS[0], max_tokens=TOKENS, temperature=0
        )
        assert answer_now.choices[0].text == alone("sport", PROMPTS[0], 0)
        assert running.service.engine is not None
        running.service.engine.drain(60)
        stats = running.service.engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert sum(stats.finished.values()) + sum(stats.failed.values()) == stats.submitted


def replace(place: Path, adapter: Path) -> None:
    """Replace the adapter at `place`: write a complete copy, then rename it."""
    fresh = place.with_name(".fresh")
    shutil.copytree(adapter, fresh)
    _exchange(fresh, place)
    shutil.rmtree(fresh)


def resident_bytes(session: AdapterSession, name: str) -> int:
    """Return the memory that an adapter takes."""
    digest = session.adapters[name]
    return int(session._bank._memory[digest].nbytes)
