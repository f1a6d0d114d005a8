"""Paths that lead nowhere are paths all the same: opening them fails, naming them does not.

What cannot be a path is refused by every public function that takes one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import pytest

import loradeploy as ld
from loradeploy.adapter import load_adapter
from loradeploy.conversion import convert
from loradeploy.errors import UsageError
from loradeploy.paths import expanded, resolved, takes_paths


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


# By function and parameter, with the other paths as they may be.
_TAKING: Final[dict[str, tuple[str, Callable[[Any], object]]]] = {
    "AdapterSession": ("bundle", lambda path: ld.AdapterSession(path)),
    "export": ("model", lambda path: ld.export(path, "new")),
    "export, output": ("output", lambda path: ld.export("model", path)),
    "export, adapters": ("adapters", lambda path: ld.export("model", "new", adapters={"a": path})),
    "export, a list": ("adapters", lambda path: ld.export("model", "new", adapters=[path])),
    "parity": ("bundle", lambda path: ld.parity(path)),
    "parity, report": ("report", lambda path: ld.parity("bundle", report=path)),
    "train": ("model", lambda path: ld.train(path, "data", "new")),
    "train, output": ("output", lambda path: ld.train("model", "data", path)),
    "load_adapter": ("path", load_adapter),
    "build_operator": ("output", ld.build_operator),
    "convert": ("adapter", lambda path: convert(path, "new", bundle="bundle")),
}
_INVALID: Final[dict[str, tuple[Any, str]]] = {
    "None": (None, "is None: give a path, as a str or a pathlib.Path"),
    "a number": (5, "is 5: give a path, as a str or a pathlib.Path"),
    "bytes": (b"x", "is b'x': give a path, as a str or a pathlib.Path"),
    "empty": ("", "is empty: give a path"),
    "a surrogate": ("a\ud800b", "with characters that the system does not support"),
    "a null byte": ("a\0b", "a path has no null bytes"),
    "a long path": (Path("a/" * 3000), "of 5,999 characters: the system does not support a path"),
    "a long name": ("x" * 300, "of 300 characters: the system does not support a path"),
}


@pytest.mark.parametrize("what", _TAKING)
@pytest.mark.parametrize("kind", _INVALID)
def test_what_cannot_be_a_path_is_a_one_line_error_that_names_the_parameter(
    what: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parameter, call = _TAKING[what]
    path, message = _INVALID[kind]
    with pytest.raises(UsageError) as raised:
        call(path)
    assert str(raised.value).startswith(f"`{parameter}` is ")
    assert message in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_default_of_none_and_a_generator_of_paths_are_accepted(tmp_path: Path) -> None:
    @takes_paths("first", "others")
    def count(first: str | None = None, others: Iterable[str] = ()) -> int:
        return len(list(others))

    assert count(None, (f"{n}" for n in range(3))) == 3
    assert count(others={"a", "b"}) == 2
    with pytest.raises(UsageError, match="`others` is 5"):
        count(others=5)  # type: ignore[arg-type]


def test_the_path_of_the_operator_is_checked(tmp_path: Path) -> None:
    for call in (ld.AdapterSession, ld.parity):
        with pytest.raises(UsageError, match="`operator` is 5: give a path"):
            call(tmp_path, operator=5)  # type: ignore[arg-type]
