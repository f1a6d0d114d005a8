"""Servers of the tiny bundles, each on a free port, in a thread of this process."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("fastapi")

from loradeploy.runtime.session import AdapterSession
from loradeploy.serve.adapters.roots import DirectoryRoot
from loradeploy.serve.http.server import Server, listen, url_of
from loradeploy.serve.keys import KeyRing
from loradeploy.serve.service import Service
from loradeploy.serve.settings import ServeLimits
from loradeploy.serve.vision import Vision
from tests.conftest import MakeAdapter

# Large enough that adapters change greedy texts of a few tokens.
LARGE = {"scale": 0.3}


@dataclass(frozen=True)
class Running:
    """A running server."""

    url: str
    service: Service
    server: Server
    clients: ExitStack
    made: dict[str, openai.OpenAI] = field(default_factory=dict)

    def client(self, key: str = "unused-by-servers-without-keys") -> openai.OpenAI:
        """Return the official OpenAI client for an API key."""
        if key not in self.made:  # clients are slow to create
            client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
            self.made[key] = self.clients.enter_context(client)
        return self.made[key]

    def http(self, **options: Any) -> httpx.Client:
        """Return a plain HTTP client."""
        client = httpx.Client(base_url=self.url, timeout=60, **options)
        return self.clients.enter_context(client)


@contextmanager
def serving(bundle: Path, **options: Any) -> Iterator[Running]:
    """Run a server of `bundle`; options that are not of `Service` are limits."""
    keys = options.pop("keys", None)
    own = {name: options.pop(name) for name in ("root", "updates", "host") if name in options}
    if isinstance(own.get("root"), Path):
        own["root"] = DirectoryRoot(own["root"])
    adapters = options.pop("adapters", {})
    budget = options.pop("host_budget", None)
    tower = options.pop("vision", None)
    session, limits = AdapterSession(bundle, host_budget=budget), ServeLimits(**options)
    load = session.load
    if tower is not None:
        own["vision"] = Vision(session, AdapterSession(tower), limits)
        load = own["vision"].generator.load
    for name, path in adapters.items():
        load(name, path)
    ring = None if keys is None else KeyRing(keys)
    service = Service(session, limits=limits, keys=ring, **own)
    server = Server(service)
    listening = listen("127.0.0.1", 0)
    url = url_of(listening)
    ready = threading.Event()
    thread = threading.Thread(target=server.serve_on, args=(listening, ready.set))
    thread.start()
    try:
        assert ready.wait(60)
        with ExitStack() as clients:
            yield Running(url, service, server, clients)
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve_adapters(tiny_llama: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    """Three adapters of the tiny Llama, of different ranks."""
    return {
        "headline": make_adapter(tiny_llama, seed=1, **LARGE),
        "sport": make_adapter(tiny_llama, seed=2, r=8, **LARGE),
        "topic": make_adapter(tiny_llama, seed=3, r=2, **LARGE),
    }


@pytest.fixture(scope="module")
def llama(tiny_llama_bundle: Path, serve_adapters: dict[str, Path]) -> Iterator[Running]:
    """A server of the tiny Llama with two adapters."""
    adapters = {name: serve_adapters[name] for name in ("headline", "sport")}
    with serving(tiny_llama_bundle, adapters=adapters, max_tokens=64) as running:
        yield running


@pytest.fixture
def root(serve_adapters: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter root with one adapter, `headline`."""
    place = tmp_path / "root"
    place.mkdir()
    shutil.copytree(serve_adapters["headline"], place / "headline")
    return place
