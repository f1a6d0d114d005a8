"""`[NAME=]DIR`: what names an adapter, and where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from loradeploy.adapter.files.named import named_directory
from loradeploy.errors import UsageError


def test_a_folder_of_a_sweep_may_have_an_equals_sign_in_its_path(tmp_path: Path) -> None:
    place = tmp_path / "lr=1e-4" / "final"
    place.mkdir(parents=True)
    assert named_directory(str(place)) == ("final", place)
    assert named_directory(f"sport={place}") == ("sport", place)


def test_a_tilde_behind_the_name_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert named_directory("sport=~/final") == ("sport", Path("/home/somebody/final"))


@pytest.mark.parametrize("text", ["", "sport=", "="])
def test_no_path_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no directory: give an adapter as"):
        named_directory(text)


def test_a_directory_names_itself() -> None:
    assert named_directory("adapters/sport/") == ("sport", Path("adapters/sport"))
