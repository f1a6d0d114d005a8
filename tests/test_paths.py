"""Paths that lead nowhere are paths all the same: opening them fails, naming them does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loradeploy.paths import expanded, resolved


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert resolved(tmp_path / "link" / ".." / "link") == Path(os.path.realpath(tmp_path)) / "there"


@pytest.mark.parametrize("below", ["", "x", "x/../y"])
def test_links_in_a_circle_end_nowhere(below: str, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    place = resolved(tmp_path / "a" / below)
    assert place.is_absolute()
    assert not place.exists()


def test_a_null_byte_ends_nowhere() -> None:
    assert resolved("a\0b") == Path("a\0b")


def test_a_tilde_is_expanded_if_the_home_directory_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expanded("~/x") == Path("/home/somebody/x")
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
