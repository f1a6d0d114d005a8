"""Adapters of an object store, which fsspec opens: here one in memory, and one of files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import openai
import pytest

from loradeploy.adapter import load_adapter
from loradeploy.errors import AdapterError
from loradeploy.serve import roots
from loradeploy.serve.roots import StoreRoot
from tests.serve.conftest import serving
from tests.serve.test_adapters import figure, names, text

URL = "memory://bucket/adapters"


@pytest.fixture
def store() -> Iterator[Any]:
    """An empty store in memory."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is asked each time."""
    monkeypatch.setattr(roots, "_REFRESH", 0.0)


def put(store: Any, adapter: Path, name: str) -> None:
    for file in adapter.rglob("*"):
        if file.is_file():
            target = f"/bucket/adapters/{name}/{file.relative_to(adapter).as_posix()}"
            store.pipe(target, file.read_bytes())


def store_root(cache: Path, max_bytes: int = 1 << 30) -> StoreRoot:
    return StoreRoot(URL, cache=cache, max_bytes=max_bytes)


def test_adapters_are_fetched_when_they_are_named_and_again_when_they_change(
    tiny_llama_bundle: Path,
    serve_adapters: dict[str, Path],
    store: Any,
    always: None,
    tmp_path: Path,
) -> None:
    put(store, serve_adapters["headline"], "news")
    digest = load_adapter(serve_adapters["topic"]).digest.removeprefix("sha256:")
    put(store, serve_adapters["topic"], digest)  # a name that says what it is
    put(store, serve_adapters["topic"], "0" * 64)  # another's
    shutil.copytree(serve_adapters["headline"], tmp_path / "files" / "news")
    shutil.copytree(serve_adapters["sport"], tmp_path / "files" / "other")
    files = StoreRoot(f"file://{tmp_path}/files", cache=None, max_bytes=1 << 30)
    temporary = files._cache
    with serving(tiny_llama_bundle, root=files) as running:
        expected = {name: text(running, name) for name in ("news", "other")}
        assert names(running) == {"news", "other"}
    assert not temporary.exists()  # it was for the service

    cache = tmp_path / "cache"
    with serving(tiny_llama_bundle, root=store_root(cache), updates=True) as running:
        assert names(running) == {"news", digest, "0" * 64}
        assert text(running, "news") == expected["news"]
        loads = figure(running, "adapter_load_time_seconds_count")
        assert text(running, "news") == expected["news"]
        assert figure(running, "adapter_load_time_seconds_count") == loads == 1
        topic = text(running, digest)
        assert len({topic, *expected.values(), text(running, "bundle-llama")}) == 4
        with pytest.raises(openai.InternalServerError, match="could not be loaded"):
            text(running, "0" * 64)
        put(store, serve_adapters["sport"], "news")
        assert text(running, "news") == expected["other"]
        for entry in cache.iterdir():  # as another process would that has no room
            shutil.rmtree(entry)
        assert text(running, "news") == expected["other"]
        assert text(running, digest) == topic
        store.pipe("/bucket/adapters/broken/adapter_config.json", b"{}")
        answer = running.http().post("/v1/load_lora_adapter", json={"lora_name": "broken"})
        assert answer.status_code == 400
        assert str(cache) not in answer.text
        store.rm("/bucket/adapters/news", recursive=True)
        with pytest.raises(openai.NotFoundError):
            text(running, "news")
    assert text_of_restart(tiny_llama_bundle, cache, digest) == topic


def text_of_restart(bundle: Path, cache: Path, name: str) -> str:
    """A service with the same cache fetches nothing again."""
    root = store_root(cache)

    def refused(*given: Any) -> None:
        raise AssertionError("it was fetched")

    root._copy = refused  # type: ignore[method-assign, assignment]
    with serving(bundle, root=root) as running:
        return text(running, name)


def test_the_cache_has_a_size(
    serve_adapters: dict[str, Path], store: Any, always: None, tmp_path: Path
) -> None:
    for name, adapter in serve_adapters.items():
        put(store, adapter, name)
    root = store_root(tmp_path)
    sizes = {name: _found(root, name).size for name in serve_adapters}
    small = store_root(tmp_path, max(sizes.values()) + min(sizes.values()))
    for name in ("headline", "topic", "headline", "sport"):
        found = _found(small, name)
        place = small.local(found)
        assert (place / "adapter_config.json").is_file()
        kept = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
        assert kept <= small._max_bytes
    assert small.has(_found(small, "sport"))
    assert not small.has(_found(small, "topic"))  # it was not used for the longest
    with pytest.raises(AdapterError, match="`max_cache_bytes`"):
        store_root(tmp_path / "other", 10).local(found)


def test_a_store_that_cannot_be_asked_leaves_what_is_loaded(
    tiny_llama_bundle: Path,
    serve_adapters: dict[str, Path],
    store: Any,
    always: None,
    tmp_path: Path,
) -> None:
    put(store, serve_adapters["headline"], "news")
    root = store_root(tmp_path)
    with serving(tiny_llama_bundle, root=root) as running:
        first = text(running, "news")

        def unreachable(*given: Any, **options: Any) -> Any:
            raise OSError("no route to the bucket")

        root._asked = unreachable  # type: ignore[method-assign]
        assert text(running, "news") == first
        with pytest.raises(openai.InternalServerError) as failed:
            text(running, "other")
        assert failed.value.status_code == 503


@pytest.mark.parametrize("name", ["..\\x", ".hidden", "a b.json", "x/y/z/w"])
def test_files_with_odd_names_are_not_fetched(
    serve_adapters: dict[str, Path], store: Any, always: None, tmp_path: Path, name: str
) -> None:
    put(store, serve_adapters["headline"], "news")
    store.pipe(f"/bucket/adapters/news/{name}", b"{}")
    root = store_root(tmp_path / "cache")
    with pytest.raises(AdapterError, match="has no usual name"):
        root.local(_found(root, "news"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_store_is_not_asked_for_every_request(
    serve_adapters: dict[str, Path], store: Any, tmp_path: Path
) -> None:
    put(store, serve_adapters["headline"], "news")
    root = store_root(tmp_path)
    first = _found(root, "news")
    put(store, serve_adapters["sport"], "news")
    assert root.find("news") == first
    assert root.find("news", fresh=True) != first


def _found(root: StoreRoot, name: str) -> roots.Found:
    found = root.find(name)
    assert found is not None
    return found
