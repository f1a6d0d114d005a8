"""The argument form `[NAME=]DIR` of adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from loradeploy.adapter.files.named import named_directory
from loradeploy.errors import UsageError


def test_a_path_can_contain_an_equals_sign(tmp_path: Path) -> None:
    place = tmp_path / "lr=1e-4" / "final"
    place.mkdir(parents=True)
    assert named_directory(str(place)) == ("final", place)
    assert named_directory(f"sport={place}") == ("sport", place)


def test_a_tilde_after_the_name_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert named_directory("sport=~/final") == ("sport", Path("/home/somebody/final"))


@pytest.mark.parametrize("text", ["", "sport=", "="])
def test_no_path_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no directory: give an adapter as"):
        named_directory(text)


def test_without_a_name_the_directory_name_is_used() -> None:
    assert named_directory("adapters/sport/") == ("sport", Path("adapters/sport"))
