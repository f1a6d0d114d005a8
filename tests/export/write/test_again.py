"""Exporting a bundle again, and what happens to its adapters."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

import loradeploy as ld
from loradeploy.adapter.files.peft import load_adapter
from loradeploy.bundle.manifest import read_manifest
from loradeploy.errors import AdapterError, BundleError, UsageError
from tests.conftest import MakeAdapter


@pytest.fixture(scope="module")
def bundle(
    tiny_llama: Path, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = tmp_path_factory.mktemp("again") / "bundle"
    adapters = {name: make_adapter(tiny_llama, seed=k) for k, name in enumerate(["one", "two"])}
    ld.export(tiny_llama, place, adapters=adapters)
    return place


@pytest.mark.parametrize(
    ("given", "missing"),
    [([], "one, two"), (["two"], "one"), (["mine=two"], "one"), (["one", "two"], None)],
)
def test_adapters_that_are_left_out_are_named(
    given: list[str],
    missing: str | None,
    bundle: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="loradeploy.export"):
        ld.export(bundle, tmp_path / "again", adapters=given, precision="int4")
    message = [text for text in caplog.messages if "are not in" in text]
    assert len(message) == (missing is not None)
    assert missing is None or f"again: {missing}; to keep one, give its name" in message[0]


def test_an_adapter_of_the_bundle_is_given_by_its_name(bundle: Path, tmp_path: Path) -> None:
    before = read_manifest(bundle).adapters
    assert before["one"].digest != before["two"].digest
    again = ld.export(bundle, tmp_path / "again", adapters=["two", "mine=one"])
    assert again.adapters["two"].digest == before["two"].digest
    assert again.adapters["mine"].digest == before["one"].digest
    session = ld.AdapterSession(tmp_path / "again")
    assert session.load("two") == before["two"].digest


def test_an_adapter_of_the_bundle_is_merged_by_its_name(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merged = ld.export(bundle, tmp_path / "merged", adapters=["two"], merge=True)
    assert merged.merged_adapter is not None
    assert merged.merged_adapter.digest == load_adapter(bundle / "adapters" / "two").digest
    assert "are not in" not in caplog.text, "one adapter is what a merge is asked for"


def test_a_directory_takes_precedence_over_an_adapter_of_the_bundle(
    bundle: Path,
    tiny_llama: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = make_adapter(tiny_llama, seed=7)
    (tmp_path / "two").symlink_to(other)
    monkeypatch.chdir(tmp_path)
    again = ld.export(bundle, tmp_path / "again", adapters={"two": "two"})
    assert again.adapters["two"].digest == load_adapter(other).digest


@pytest.mark.parametrize("file", ["README.md", "loradeploy.json"])
def test_a_directory_without_an_adapter_does_not_hide_the_name(
    file: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / file).write_text("{}")
    monkeypatch.chdir(tmp_path)
    again = ld.export(bundle, tmp_path / "again", adapters=["two"])
    assert again.adapters["two"].digest == read_manifest(bundle).adapters["two"].digest


def test_what_is_neither_a_directory_nor_a_name_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError, match="three is neither an adapter of .*, which has one, two, nor a directory"
    ):
        ld.export(bundle, tmp_path / "again", adapters=["three"])


def test_an_adapter_of_the_bundle_that_was_changed_is_refused(bundle: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(bundle, changed)
    shutil.rmtree(changed / "adapters" / "two")
    shutil.copytree(changed / "adapters" / "one", changed / "adapters" / "two")
    with pytest.raises(BundleError, match="is not the adapter that came with the bundle"):
        ld.export(changed, tmp_path / "again", adapters=["two"])


def test_a_bundle_can_be_exported_to_a_directory_inside_itself(
    bundle: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(bundle, tmp_path / "source")
    files = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    again = ld.export(source, source / "forms" / "slots", adapters=["one"], layout="slots")
    assert again.layout == "slots"
    assert {path: path.read_bytes() for path in files} == files
    for place in (source, source / "forms" / "slots"):
        with ld.AdapterSession(place) as session:
            assert session.load("one") == again.adapters["one"].digest
    with pytest.raises(UsageError, match=r"also has .*which would be lost"):
        ld.export(source / "forms" / "slots", source)


def test_a_bundle_is_not_converted_in_place(bundle: Path, tmp_path: Path) -> None:
    source = shutil.copytree(bundle, tmp_path / "source")
    files = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    for output in (source, tmp_path / "." / "source", source / "adapters" / ".."):
        with pytest.raises(UsageError, match="would be replaced by the output"):
            ld.export(source, output, layout="slots")
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == files
