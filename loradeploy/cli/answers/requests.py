"""Read the prompts of `loradeploy run`, and load the adapters that they name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loradeploy.errors import DataError, UnknownAdapterError, listed_names
from loradeploy.files import MAX_TEXT_BYTES
from loradeploy.paths import resolved

if TYPE_CHECKING:
    from loradeploy.runtime.adapters.resident import AdapterSpec
    from loradeploy.runtime.prompts import InputPrompt
    from loradeploy.runtime.session import AdapterSession


def read_prompts(name: str, adapter: str | None) -> list[InputPrompt]:
    """Read the prompts in the file `name`, or from standard input if it is "-".

    `adapter`: that of prompts that do not name their own.
    """
    from loradeploy.runtime.prompts import looks_like_json_lines, parse_requests, read_requests

    if name == "-":
        content = _standard_input()
        as_json = looks_like_json_lines(content)
        return parse_requests(content, "standard input", adapter, as_json=as_json)
    return read_requests(name, adapter)


def load_adapters(
    session: AdapterSession,
    known: Collection[str],
    load: Callable[[str, Path], object],
    asked: Sequence[AdapterSpec | None],
) -> list[AdapterSpec | None]:
    """Return the requested adapters by name in the session; paths are loaded, in blends too.

    `known`: the names of adapters. `load`: loads a path as a name.
    """
    given = dict.fromkeys(
        adapter
        for spec in asked
        if spec is not None
        for adapter in ((spec,) if isinstance(spec, str) else spec)
    )
    names: dict[str, str] = {}
    for adapter in given:
        names[adapter] = adapter
        if adapter not in known:
            place = _place(session, known, adapter)
            # The name of a path is its last part; if that is ambiguous, it is the path.
            name = resolved(place).stem if place.is_file() else resolved(place).name
            taken = (*known, *given, *names.values())
            names[adapter] = adapter if name in taken else name
            load(names[adapter], place)
    return [
        None
        if spec is None
        else names[spec]
        if isinstance(spec, str)
        else {names[adapter]: weight for adapter, weight in spec.items()}
        for spec in asked
    ]


def _place(session: AdapterSession, known: Collection[str], adapter: str) -> Path:
    """The path of an adapter that is not known by name."""
    place = Path(adapter)
    if not adapter or not place.exists():
        raise UnknownAdapterError(
            f"{adapter!r} is neither an adapter of {session.path}, which has"
            f" {listed_names(known)}, nor a directory"
        )
    return place


def _standard_input() -> str:
    try:
        content = sys.stdin.read(MAX_TEXT_BYTES + 1)
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"standard input cannot be read as UTF-8 text: {problem}") from None
    if len(content) > MAX_TEXT_BYTES:
        raise DataError(f"standard input has more than the {MAX_TEXT_BYTES:,} characters of a run")
    return content.removeprefix("\ufeff")  # a byte order mark
