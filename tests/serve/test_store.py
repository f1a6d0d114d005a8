"""Adapters in an object store opened by fsspec: tested with stores in memory and of files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import openai
import pytest

from loradeploy.adapter import load_adapter
from loradeploy.errors import AdapterError, AdapterStoreError, UsageError
from loradeploy.serve.adapters import roots
from loradeploy.serve.adapters.fetched import FetchedAdapters
from loradeploy.serve.adapters.roots import StoreRoot
from tests.serve.answers import figure, names, text
from tests.serve.conftest import serving

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
    """Query the store at every request, without the cache time."""
    monkeypatch.setattr(roots, "_REFRESH", 0.0)


def put(store: Any, adapter: Path, name: str) -> None:
    for file in adapter.rglob("*"):
        if file.is_file():
            target = f"/bucket/adapters/{name}/{file.relative_to(adapter).as_posix()}"
            store.pipe(target, file.read_bytes())


def store_root(cache: Path, max_bytes: int = 1 << 30) -> StoreRoot:
    return StoreRoot(URL, cache=cache, max_bytes=max_bytes)


def test_adapters_are_fetched_at_first_use_and_again_when_they_change(
    tiny_llama_bundle: Path,
    serve_adapters: dict[str, Path],
    store: Any,
    always: None,
    tmp_path: Path,
) -> None:
    put(store, serve_adapters["headline"], "news")
    digest = load_adapter(serve_adapters["topic"]).digest.removeprefix("sha256:")
    put(store, serve_adapters["topic"], digest)  # named by its digest
    put(store, serve_adapters["topic"], "0" * 64)  # another digest
    shutil.copytree(serve_adapters["headline"], tmp_path / "files" / "news")
    shutil.copytree(serve_adapters["sport"], tmp_path / "files" / "other")
    files = StoreRoot(f"file://{tmp_path}/files", cache=None, max_bytes=1 << 30)
    temporary = files._fetched.directory
    with serving(tiny_llama_bundle, root=files) as running:
        expected = {name: text(running, name) for name in ("news", "other")}
        assert names(running) == {"news", "other"}
    assert not temporary.exists()  # removed with the service

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
        for entry in cache.iterdir():  # as another process does that needs the space
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
    """Start a service with the same cache, which must fetch nothing, and return its text."""
    root = store_root(cache)

    def refused(*given: Any) -> None:
        raise AssertionError("it was fetched")

    root._copy = refused  # type: ignore[method-assign, assignment]
    with serving(bundle, root=root) as running:
        return text(running, name)


def test_the_cache_has_a_maximum_size(
    serve_adapters: dict[str, Path], store: Any, always: None, tmp_path: Path
) -> None:
    for name, adapter in serve_adapters.items():
        put(store, adapter, name)
    root = store_root(tmp_path)
    sizes = {name: _found(root, name).size for name in serve_adapters}
    small = store_root(tmp_path, max(sizes.values()) + min(sizes.values()))
    for name in ("headline", "topic", "headline", "sport"):
        found = _found(small, name)
        with small.local(found) as place:
            assert (place / "adapter_config.json").is_file()
        kept = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
        assert kept <= small._max_bytes
    assert small.has(_found(small, "sport"))
    assert not small.has(_found(small, "topic"))  # least recently used
    with (
        pytest.raises(AdapterError, match="`max_cache_bytes`"),
        store_root(tmp_path / "other", 10).local(found),
    ):
        pass


def test_an_unreachable_store_does_not_affect_loaded_adapters(
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
    with (
        pytest.raises(AdapterError, match="is not allowed"),
        root.local(_found(root, "news")),
    ):
        pass
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_store_is_not_queried_for_every_request(
    serve_adapters: dict[str, Path], store: Any, tmp_path: Path
) -> None:
    put(store, serve_adapters["headline"], "news")
    root = store_root(tmp_path)
    first = _found(root, "news")
    put(store, serve_adapters["sport"], "news")
    assert root.find("news") == first
    assert root.find("news", fresh=True) != first


def write(store: Any, version: bytes, name: str = "news") -> None:
    """Write two files of the same sizes in each version."""
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        store.pipe(f"/bucket/adapters/{name}/{file}", version)


def test_a_load_sees_files_that_were_just_uploaded(
    tiny_llama_bundle: Path, serve_adapters: dict[str, Path], store: Any, tmp_path: Path
) -> None:
    put(store, serve_adapters["headline"], "news")
    with serving(tiny_llama_bundle, root=store_root(tmp_path), updates=True) as running:
        http = running.http()

        def load(name: str) -> int:
            body = {"lora_name": name, "load_inplace": True}
            return http.post("/v1/load_lora_adapter", json=body).status_code

        assert (load("news"), load("later")) == (200, 404)
        first = text(running, "news")
        for name in ("news", "later"):
            put(store, serve_adapters["sport"], name)
            assert load(name) == 200
        assert text(running, "news") == text(running, "later") != first


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_an_adapter_that_changes_while_it_is_fetched_is_not_cached(
    store: Any, tmp_path: Path, moment: str
) -> None:
    """`moment`: when the new version is written, relative to the first fetched file."""
    write(store, b"v1")
    root = store_root(tmp_path)
    first = _found(root, "news")
    copy, changes = root._copy, iter([True])

    def changing(*given: Any) -> bool:
        change = next(changes, False)
        if change and moment == "between":
            copied = copy(*given)
            write(store, b"v2")
            return copied
        copied = copy(*given)
        if moment == "after" and str(given[0]).endswith("adapter_model.safetensors"):
            write(store, b"v2")
        return copied

    root._copy = changing  # type: ignore[method-assign]
    if moment == "before":
        write(store, b"v2")
    with pytest.raises(AdapterStoreError, match="try again"), root.local(first):
        pass
    assert list(tmp_path.iterdir()) == []
    assert not root.has(first)
    root._copy = copy  # type: ignore[method-assign]
    again = root.find("news", fresh=True)
    assert again is not None
    assert again != first
    with root.local(again) as place:
        assert {file.read_bytes() for file in place.iterdir()} == {b"v2"}


def test_a_fresh_query_does_not_use_cached_results(store: Any, tmp_path: Path) -> None:
    write(store, b"v1")
    root = store_root(tmp_path)
    known = _found(root, "news")

    def unreachable(*given: Any, **options: Any) -> Any:
        raise OSError("no route to the bucket")

    root._store = type("Down", (), {"invalidate_cache": unreachable, "find": unreachable})()
    with pytest.raises(AdapterStoreError, match="no route"):
        root.find("news", fresh=True)
    assert root.find("news") == known


def test_an_adapter_does_not_include_files_of_another_with_the_same_prefix(
    store: Any, tmp_path: Path
) -> None:
    write(store, b"v1", "a")
    write(store, b"v2", "ab")
    root = store_root(tmp_path)
    listed = root._store.find

    def by_prefix(place: str, **options: Any) -> Any:
        """List by prefix, like stores without directories."""
        names = listed("/bucket/adapters", **options)
        return {name: info for name, info in names.items() if name.startswith(place)}

    class ByPrefix:
        invalidate_cache = staticmethod(root._store.invalidate_cache)
        find = staticmethod(by_prefix)
        open = staticmethod(root._store.open)

    root._store = ByPrefix()  # type: ignore[assignment]
    found = _found(root, "a")
    assert found.files == 2
    with root.local(found) as place:
        assert {file.read_bytes() for file in place.rglob("*") if file.is_file()} == {b"v1"}


def test_a_password_in_the_url_is_not_printed(tmp_path: Path) -> None:
    secret = "://name:pass@word@"
    root = StoreRoot(f"memory{secret}host/adapters", cache=tmp_path, max_bytes=1)
    assert root.url == "memory://host/adapters"
    failed = root._failed("it", OSError(f"no answer from ftp{secret}host/adapters/a"))
    assert str(failed) == (
        "memory://host/adapters: it cannot be read: no answer from ftp://host/adapters/a"
    )
    with pytest.raises(UsageError) as refused:
        StoreRoot(f"nothing{secret}host/adapters", cache=tmp_path, max_bytes=1)
    assert "pass" not in str(refused.value)


def fill(size: int) -> Callable[[Path], None]:
    def write_file(place: Path) -> None:
        (place / "file").write_bytes(b"x" * size)

    return write_file


def test_entries_in_use_are_kept_and_abandoned_ones_are_removed(tmp_path: Path) -> None:
    abandoned, growing = tmp_path / ".partial-old", tmp_path / ".partial-new"
    for partial in (abandoned, growing):
        partial.mkdir()
        fill(10)(partial)
    for place in (abandoned, abandoned / "file", growing):
        os.utime(place, (0, 0))
    fetched = FetchedAdapters(tmp_path, 100)
    assert growing.exists()  # written to just now
    assert not abandoned.exists()
    with fetched.reading("a", 50, fill(50)) as place:
        with fetched.reading("b", 40, fill(40)):
            pass
        with fetched.reading("c", 40, fill(40)):  # evicts b
            assert not fetched.has("b")
            with (
                pytest.raises(AdapterStoreError, match="being read"),
                fetched.reading("d", 20, fill(20)),
            ):
                pass
        assert (place / "file").stat().st_size == 50
    with fetched.reading("d", 60, fill(60)):
        assert not fetched.has("a")
    sizes = [file.stat().st_size for file in tmp_path.rglob("file")]
    assert sum(sizes) <= 100, "others' bytes count too"


def _found(root: StoreRoot, name: str) -> roots.Found:
    found = root.find(name)
    assert found is not None
    return found
