"""A session uses one consistent state of a bundle, even if files change during or after opening."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from loradeploy.errors import BundleError
from loradeploy.export.api import export
from loradeploy.runtime import session as opening
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from loradeploy.runtime.text.sides import TextSides
from tests.export.graphs import IN, linear, numbers, run
from tests.runtime.feeds import logits, random_ids

IDS = random_ids(2, 6)
DATA = "model.onnx.data"


def test_a_directory_without_a_manifest_is_refused_without_listing_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be the root of a disk."""
    monkeypatch.setattr("os.walk", lambda *_: pytest.fail("all of its files are listed"))
    with pytest.raises(BundleError, match="is not a bundle, it has no loradeploy.json"):
        AdapterSession(tmp_path)


def test_an_adapter_in_place_of_a_bundle_is_named_by_the_path_that_was_given(
    tmp_path: Path,
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(BundleError, match="link is an adapter, not a bundle: give a directory"):
        AdapterSession(tmp_path / "link")


def overwrite_weights(certified: Path) -> None:
    """Overwrite the weights in place."""
    with open(certified / DATA, "r+b") as file:
        content = np.frombuffer(file.read(), np.uint8)
        file.seek(0)
        file.write((content ^ 1).tobytes())


@pytest.mark.parametrize("own_options", [False, True], ids=["no options", "options of a user"])
def test_overwriting_the_data_file_does_not_change_an_open_session(
    certified: Path, own_options: bool
) -> None:
    options = onnxruntime.SessionOptions() if own_options else None
    session = AdapterSession(certified, session_options=options)
    expected = logits(session, IDS, None)
    overwrite_weights(certified)
    assert np.array_equal(logits(session, IDS, None), expected)
    os.truncate(certified / DATA, 0)  # with a mapped file the process would crash
    assert np.array_equal(logits(session, IDS, None), expected)


@pytest.mark.parametrize("own_options", [False, True], ids=["no options", "options of a user"])
def test_a_graph_with_all_weights_inside_can_be_opened(own_options: bool, tmp_path: Path) -> None:
    """The data file is empty: none of the tensors is large enough for it."""
    ir.save(linear(), tmp_path / "model.onnx")
    export(tmp_path / "model.onnx", tmp_path / "b", task="feature-extraction")
    assert (tmp_path / "b" / DATA).stat().st_size == 0
    options = onnxruntime.SessionOptions() if own_options else None
    session = AdapterSession(tmp_path / "b", session_options=options)
    (found,) = session.run(["y"], {"x": numbers(2, 3, IN)})
    assert np.allclose(found, run(linear(), {"x": numbers(2, 3, IN)}))
    (tmp_path / "b" / DATA).write_bytes(b"0")
    with pytest.raises(BundleError, match=r"is not the one that loradeploy\.json declares"):
        AdapterSession(tmp_path / "b", session_options=options)


def test_session_options_of_a_user_can_be_used_for_several_sessions(certified: Path) -> None:
    options = onnxruntime.SessionOptions()
    one, other = (AdapterSession(certified, session_options=options) for _ in range(2))
    assert np.array_equal(logits(one, IDS, None), logits(other, IDS, None))


def test_weights_of_another_export_are_refused(certified: Path) -> None:
    overwrite_weights(certified)
    with pytest.raises(BundleError, match=r"model\.onnx\.data is not the one that loradeploy\.js"):
        AdapterSession(certified)


def at_opening(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], times: int) -> None:
    """Call `act` before a graph is opened, the first `times` times."""
    right = opening.open_graph
    done: list[int] = []

    def open_graph(*arguments: Any, **options: Any) -> Any:
        if len(done) < times:
            done.append(1)
            act()
        return right(*arguments, **options)

    monkeypatch.setattr(opening, "open_graph", open_graph)


def test_a_bundle_that_is_replaced_during_opening_is_opened_again(
    certified: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = logits(AdapterSession(certified), IDS, None)
    new = shutil.copytree(certified, tmp_path / "new")

    def replace() -> None:
        certified.rename(tmp_path / "old")
        new.rename(certified)

    at_opening(monkeypatch, replace, 1)
    session = AdapterSession(certified)
    assert np.array_equal(logits(session, IDS, None), expected)
    assert TextGenerator(session).generate(["News"], max_new_tokens=2)


def test_a_bundle_that_is_written_to_at_every_attempt_is_refused(
    certified: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_opening(monkeypatch, lambda: os.utime(certified / "config.json"), 99)
    with pytest.raises(BundleError, match=r"is being written to \(config\.json\).*new directory"):
        AdapterSession(certified)


def test_a_tokenizer_that_changed_after_the_opening_is_refused(certified: Path) -> None:
    session = AdapterSession(certified)
    (certified / "tokenizer.json").write_bytes((certified / "tokenizer.json").read_bytes() + b"\n")
    with pytest.raises(BundleError, match=r"tokenizer\.json has changed since the session was op"):
        TextGenerator(session)


def test_unknown_files_in_a_bundle_are_ignored(certified: Path) -> None:
    session = AdapterSession(certified, require_certificate=True)
    (certified / "notes.txt").write_text("mine")
    TextGenerator(session)
    AdapterSession(certified, require_certificate=True)


def test_a_bundle_can_be_rolled_out_by_switching_a_link_under_load(
    certified: Path, tmp_path: Path
) -> None:
    """As in docs/bundles.md: write a new directory, switch a link, keep the old one in use."""
    second = shutil.copytree(certified, tmp_path / "v2")
    served = tmp_path / "served"
    served.symlink_to(certified)
    expected = logits(AdapterSession(served), IDS, "one")
    stop, wrong = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            try:
                wrong.extend(
                    []
                    if np.array_equal(logits(AdapterSession(served), IDS, "one"), expected)
                    else ["other numbers"]
                )
            except Exception as problem:
                wrong.append(repr(problem))

    thread = threading.Thread(target=work)
    thread.start()
    for turn in range(20):
        link = tmp_path / f"link-{turn}"
        link.symlink_to(second if turn % 2 else certified)
        os.replace(link, served)
        stop.wait(0.02)
    stop.set()
    thread.join()
    assert wrong == []


def test_a_row_has_text_files_and_factors_of_the_same_adapter(
    certified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is replaced after its text files were read and before its factors are in use."""
    session = AdapterSession(certified)
    other = shutil.copytree(certified / "adapters/one", tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(certified / name, other / name)
    (other / "chat_template.jinja").write_text("Other: {{ messages[0].content }}")
    generator = TextGenerator(session)
    session.load("x", certified / "adapters/one")
    right, calls = TextSides.of, []

    def of(self: TextSides, spec: Any) -> Any:
        side = right(self, spec)
        if spec == "x" and not calls:
            calls.append(1)
            session.load("x", other, replace=True)
        return side

    monkeypatch.setattr(TextSides, "of", of)
    (found,) = generator.generate(["Hello"], "x", chat=True, max_new_tokens=1)
    monkeypatch.undo()
    assert found == generator.generate(["Hello"], "x", chat=True, max_new_tokens=1)[0]
    assert found.prompt_tokens != generator.generate(["Hello"], max_new_tokens=1)[0].prompt_tokens
