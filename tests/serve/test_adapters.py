"""Adapters in the adapter root: found by name, reloaded when changed, loaded by request."""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

import openai
import pytest

from loradeploy.adapter.files import peft
from loradeploy.errors import AdapterError, BudgetError, UsageError
from loradeploy.serve.adapters.catalog import Catalog
from loradeploy.serve.adapters.roots import DirectoryRoot
from tests.conftest import MakeAdapter
from tests.serve.answers import figure, names, text
from tests.serve.conftest import LARGE, serving

PROMPT = "Shares rose"


def put(adapter: Path, place: Path) -> None:
    """Replace the adapter at `place` atomically."""
    ready = place.with_name(f".{place.name}.new")
    shutil.copytree(adapter, ready)
    shutil.rmtree(place, ignore_errors=True)
    ready.rename(place)


def test_an_adapter_can_be_added_replaced_and_removed_without_a_restart(
    tiny_llama_bundle: Path, serve_adapters: dict[str, Path], root: Path
) -> None:
    with serving(tiny_llama_bundle, root=root) as running:
        base, first = text(running, "bundle-llama"), text(running, "headline")
        assert names(running) == {"headline"}
        put(serve_adapters["sport"], root / "sport")  # a new adapter
        assert names(running) == {"headline", "sport"}
        sport = text(running, "sport")
        put(serve_adapters["topic"], root / "headline")  # another one under the same name
        replaced = text(running, "headline")
        put(serve_adapters["topic"], root / "topic")
        assert text(running, "topic") == replaced
        assert len({base, first, sport, replaced}) == 4
        loads = figure(running, "adapter_load_time_seconds_count")
        assert loads == 4
        text(running, "sport")
        assert figure(running, "adapter_load_time_seconds_count") == loads  # unchanged

        (root / "broken").mkdir()
        config = (root / "sport" / "adapter_config.json").read_text()
        (root / "broken" / "adapter_config.json").write_text(config)
        with pytest.raises(
            openai.InternalServerError, match="could not be loaded; the server.s log"
        ) as failed:
            text(running, "broken")
        assert failed.value.status_code == 503
        assert str(root) not in str(failed.value)
        assert text(running, "sport") == sport  # only that request failed
        put(serve_adapters["headline"], root / "broken")
        assert text(running, "broken") == first

        shutil.rmtree(root / "sport")
        with pytest.raises(openai.NotFoundError):
            text(running, "sport")
        assert "sport" not in names(running)


def test_config_and_weights_are_of_the_same_version(
    tiny_llama: Path,
    tiny_llama_bundle: Path,
    make_adapter: MakeAdapter,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new = shutil.copytree(make_adapter(tiny_llama, seed=9, **LARGE), root.parent / "new")
    config = json.loads((new / "adapter_config.json").read_text())
    config["lora_alpha"] *= 4
    (new / "adapter_config.json").write_text(json.dumps(config))
    read, changes = peft.read_arrays, iter([True])
    writing: list[bool] = []

    def changed_meanwhile(file: Any, **options: Any) -> Any:
        """Read the weights after the directory was replaced since the config was read."""
        if "headline" in str(file) and (writing or next(changes, False)):
            put(new, root / "headline")
        return read(file, **options)

    with serving(tiny_llama_bundle, root=root) as running:
        first = text(running, "headline")
        put(new, root / "whole")
        whole = text(running, "whole")
        config["lora_alpha"] *= 2  # any change, so that it is read again
        (root / "headline" / "adapter_config.json").write_text(json.dumps(config))
        monkeypatch.setattr(peft, "read_arrays", changed_meanwhile)
        assert text(running, "headline") == whole != first
        writing.append(True)
        put(new, root / "headline")
        with pytest.raises(openai.InternalServerError) as failed:
            text(running, "headline")
        assert failed.value.status_code == 503
        writing.clear()
        assert text(running, "headline") == whole


def test_a_version_that_is_restored_is_read_again(
    tiny_llama_bundle: Path,
    serve_adapters: dict[str, Path],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A first version, one that is replaced during reading, a refused one, and the first again."""
    first, kept = root / "headline", root.parent / "kept"
    with serving(tiny_llama_bundle, root=root) as running:
        expected = text(running, "headline")
        session = running.service.session
        load, refused = session.load, iter([True])

        def replaced_by_a_cut_one(*given: Any, **options: Any) -> str:
            digest = load(*given, **options)
            if next(refused, False):
                (first / "adapter_model.safetensors").write_bytes(b"")
            return digest

        monkeypatch.setattr(session, "load", replaced_by_a_cut_one)
        first.rename(kept)
        put(serve_adapters["sport"], first)
        with pytest.raises(openai.InternalServerError):
            text(running, "headline")
        shutil.rmtree(first)
        kept.rename(first)
        assert text(running, "headline") == expected


def test_an_adapter_evicted_from_memory_is_read_again(
    tiny_llama_bundle: Path, serve_adapters: dict[str, Path], root: Path
) -> None:
    put(serve_adapters["topic"], root / "topic")
    with serving(tiny_llama_bundle, root=root) as running:
        expected = {name: text(running, name) for name in ("headline", "topic")}
        size = running.service.session.statistics.host_bytes
    with serving(tiny_llama_bundle, root=root, host_budget=size - 1) as running:
        for _ in range(2):
            for name, answer in expected.items():
                assert text(running, name) == answer
        assert figure(running, "adapter_cache_evictions_total") >= 3
        assert figure(running, "adapters_resident") == 1


def test_a_name_cannot_leave_the_root(
    tiny_llama_bundle: Path, serve_adapters: dict[str, Path], root: Path
) -> None:
    shutil.copytree(serve_adapters["sport"], root / ".hidden")
    (root / "linked").symlink_to(serve_adapters["sport"])
    shutil.copytree(serve_adapters["sport"], root / "large")
    with (root / "large" / "more.bin").open("wb") as file:
        os.truncate(file.fileno(), 1 << 30)
    limit = 1 << 24
    with serving(tiny_llama_bundle, root=root, updates=True, max_adapter_bytes=limit) as running:
        http = running.http()
        names = ["../headline", "a/b", "/etc", "..", ".", ".hidden", "linked", "a\0b", "x" * 200]
        for name in (*names, "large"):
            body: dict[str, Any] = {"model": name, "prompt": PROMPT, "max_tokens": 1}
            asked = http.post("/v1/completions", json=body)
            assert asked.status_code == (503 if name == "large" else 404), name
            for given in ({"lora_name": name}, {"lora_name": "other", "lora_path": name}):
                status = http.post("/v1/load_lora_adapter", json=given).status_code
                assert status in (400, 404), name
        assert set(running.service.session.adapters) == set()


def test_adapters_are_loaded_and_unloaded_by_vllms_api(
    tiny_llama_bundle: Path, serve_adapters: dict[str, Path], root: Path
) -> None:
    put(serve_adapters["sport"], root / "sport")
    with serving(tiny_llama_bundle, root=root, updates=True) as running:
        http = running.http()
        sport = text(running, "sport")

        def post(verb: str, **body: Any) -> tuple[int, str]:
            answer = http.post(f"/v1/{verb}_lora_adapter", json=body)
            return answer.status_code, answer.text

        assert post("load", lora_name="news", lora_path="headline") == (
            200,
            "Success: LoRA adapter 'news' added successfully.",
        )
        first = text(running, "news")
        assert first == text(running, "headline") != sport
        assert post("load", lora_name="news", lora_path="sport")[0] == 400
        assert post("load", lora_name="news", lora_path="sport", load_inplace=True)[0] == 200
        assert text(running, "news") == sport
        (root / "cut").mkdir()
        shutil.copy(root / "sport" / "adapter_config.json", root / "cut")
        status, answer = post("load", lora_name="news", lora_path="cut", load_inplace=True)
        assert (status, json.loads(answer)["error"]["code"]) == (400, "adapter_load_failed")
        assert text(running, "news") == sport  # unchanged
        assert post("unload", lora_name="news")[0] == 200
        assert post("unload", lora_name="news")[0] == 404
        with pytest.raises(openai.NotFoundError):
            text(running, "news")
        assert post("unload", lora_name="sport")[0] == 200
        with pytest.raises(openai.NotFoundError):  # although its files exist
            text(running, "sport")
        assert "sport" not in names(running)
        assert post("load", lora_name="sport")[0] == 200
        assert text(running, "sport") == sport
        assert post("load", lora_name="bundle-llama", lora_path="sport")[0] == 400
        assert post("load", lora_name="x", lora_path="nobody")[0] == 404


def test_loads_and_unloads_of_a_name_are_serialized(
    tiny_llama_bundle: Path,
    serve_adapters: dict[str, Path],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(serve_adapters["sport"], root / "sport")
    with serving(tiny_llama_bundle, root=root, updates=True) as running:
        http, session = running.http(), running.service.session
        load, begun, go_on = session.load, threading.Event(), threading.Event()

        def slow(name: str, *given: Any, **options: Any) -> str:
            begun.set()
            assert go_on.wait(30)
            return load(name, *given, **options)

        def post(verb: str, **body: Any) -> int:
            return http.post(f"/v1/{verb}_lora_adapter", json=body).status_code

        monkeypatch.setattr(session, "load", slow)
        with ThreadPoolExecutor(2) as pool:  # an unload during a load
            loaded = pool.submit(post, "load", lora_name="sport")
            assert begun.wait(30)
            unloaded = pool.submit(post, "unload", lora_name="sport")
            with pytest.raises(FutureTimeoutError):
                unloaded.result(0.3)
            go_on.set()
            assert (loaded.result(), unloaded.result()) == (200, 200)
        assert "sport" not in session.adapters
        assert post("unload", lora_name="sport") == 404

        def vanishing(name: str, *given: Any, **options: Any) -> str:
            shutil.rmtree(root / "headline")
            return load(name, *given, **options)

        monkeypatch.setattr(session, "load", vanishing)
        assert post("load", lora_name="headline") == 404  # removed
        assert "headline" not in names(running)


def test_a_temporary_system_error_is_not_cached(
    tiny_llama_bundle: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*given: Any, **options: Any) -> Any:
        try:
            raise OSError(24, "Too many open files")
        except OSError as problem:
            raise AdapterError(f"headline cannot be read: {problem}") from None

    def large(*given: Any, **options: Any) -> Any:
        raise BudgetError("it takes more than the whole budget")

    with serving(tiny_llama_bundle, root=root) as running:
        for failing in (exhausted, large):
            with monkeypatch.context() as patched:
                patched.setattr(running.service.session, "load", failing)
                with pytest.raises(openai.APIStatusError):
                    text(running, "headline")
        assert text(running, "headline") != text(running, "bundle-llama")


def test_updates_are_off_by_default(tiny_llama_bundle: Path, root: Path) -> None:
    with serving(tiny_llama_bundle, root=root) as running:
        http = running.http()
        for verb in ("load", "unload"):
            answer = http.post(f"/v1/{verb}_lora_adapter", json={"lora_name": "headline"})
            assert answer.status_code == 404
            assert "--allow-adapter-updates" in answer.json()["error"]["message"]


def test_a_directory_of_checkpoints_in_the_root_is_not_listed_as_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "news-checkpoints" / "checkpoint-8").mkdir(parents=True)
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "adapter_config.json").touch()
    (tmp_path / "sport.onnx_adapter").touch()
    assert DirectoryRoot(tmp_path).listed() == ["news", "sport"]


def test_a_directory_that_may_not_be_read_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("news", "secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    stat = os.stat

    def refusing(path: Any, **options: Any) -> os.stat_result:
        if "secret" in Path(os.fsdecode(path)).parts[:-1]:
            raise PermissionError(path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refusing)
    assert DirectoryRoot(tmp_path).listed() == ["news"]


def test_one_name_cannot_be_two_models(
    tiny_llama_bundle: Path, serve_adapters: dict[str, Path], tmp_path: Path
) -> None:
    from loradeploy.runtime.session import AdapterSession

    with AdapterSession(tiny_llama_bundle) as session:
        session.load("bundle-llama", serve_adapters["sport"])
        with pytest.raises(UsageError, match="the same name"):
            Catalog(session, root=None, max_bytes=1, on_load=print, others=())
        session.unload("bundle-llama")
        session.path = tmp_path / "served"  # a link to the bundle: rollouts keep the name
        session.path.symlink_to(tiny_llama_bundle)
        catalog = Catalog(session, root=None, max_bytes=1, on_load=print, others=())
        assert catalog.base == "served"
        with pytest.raises(UsageError, match="is not a directory"):
            DirectoryRoot(tmp_path / "nothing")
