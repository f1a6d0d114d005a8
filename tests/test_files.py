"""Reading files: no path leaves its directory, and JSON is bounded and strict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from loradeploy.errors import BundleError
from loradeploy.files import inside, json_values, read_json


@pytest.mark.parametrize("escape", ["/etc/passwd", "../secret", "a/../../secret", "link/secret"])
def test_a_path_that_leads_out_of_its_directory_is_refused(escape: str, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(BundleError, match="is outside"):
        inside(tmp_path / "root", escape)
    assert inside(tmp_path / "root", "a/b").is_relative_to(tmp_path)


def test_a_snapshot_of_the_hugging_face_cache_is_read_through_its_links(tmp_path: Path) -> None:
    model = tmp_path / "models--owner--name"
    snapshot = model / "snapshots" / "0123abc"
    for folder in (snapshot / "1_Pooling", model / "blobs"):
        folder.mkdir(parents=True)
    (model / "blobs" / "d1").write_text("content")
    (tmp_path / "secret").write_text("x")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/d1")
    (snapshot / "stolen.json").symlink_to(tmp_path / "secret")
    assert inside(snapshot, "1_Pooling/config.json").read_text() == "content"
    assert inside(snapshot / "1_Pooling", "config.json").read_text() == "content"
    for escape in ("stolen.json", "../../blobs/d1", str(model / "blobs" / "d1")):
        with pytest.raises(BundleError, match="is outside"):
            inside(snapshot, escape)


def test_json_can_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text('{"r": 8}', encoding="utf-8-sig")
    assert read_json(tmp_path / "file.json", error=BundleError) == {"r": 8}


def test_json_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "large.json").write_text(" " * 2000 + "{}")
    with pytest.raises(BundleError, match="not readable as JSON"):
        read_json(tmp_path / "deep.json", error=BundleError)
    with pytest.raises(BundleError, match="2,002 bytes"):
        read_json(tmp_path / "large.json", error=BundleError, limit=1000)


def test_values_of_a_report_become_json(tmp_path: Path) -> None:
    @dataclass
    class Figures:
        file: Path
        errors: tuple[float, ...]

    found = json_values({"b": Figures(tmp_path, (0.5, math.inf)), "a": [None, True]})
    assert list(found) == ["a", "b"]
    assert found == {"a": [None, True], "b": {"file": str(tmp_path), "errors": [0.5, None]}}
