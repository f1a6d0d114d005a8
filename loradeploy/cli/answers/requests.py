"""Read the prompts of `loradeploy run`, and load the adapters that they name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loradeploy.errors import DataError, UnknownAdapterError, listed_names, shown
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
    requests: Sequence[InputPrompt],
    default: str | None,
) -> list[AdapterSpec | None]:
    """Return the requested adapters by name in the session; paths are loaded, in blends too.

    `known`: the names of adapters. `load`: loads a path as a name. `default`: the adapter of
    prompts that do not name their own.

    Raises:
        UnknownAdapterError: an adapter is neither known nor a path; the line is named.
    """
    given: dict[str, str] = {}  # the beginning of messages by adapter: the first line that names it
    for request in requests:
        spec = request.adapter
        for adapter in () if spec is None else (spec,) if isinstance(spec, str) else spec:
            own = request.where is not None and spec != default
            given.setdefault(adapter, f"{request.where}: " if own else "")
    names: dict[str, str] = {}
    for adapter, where in given.items():
        names[adapter] = adapter
        if adapter not in known:
            place = Path(adapter)
            if not adapter or not place.exists():
                merged = session.manifest.mode == "merged"
                has = "is merged and takes none" if merged else f"has {listed_names(known)}"
                raise UnknownAdapterError(
                    f"{where}{shown(adapter)} is neither an adapter of {session.path}, which {has},"
                    " nor a directory"
                )
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
        for spec in (request.adapter for request in requests)
    ]


def _standard_input() -> str:
    try:
        content = sys.stdin.read(MAX_TEXT_BYTES + 1)
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"standard input cannot be read as UTF-8 text: {problem}") from None
    if len(content) > MAX_TEXT_BYTES:
        raise DataError(f"standard input has more than the {MAX_TEXT_BYTES:,} characters of a run")
    return content.removeprefix("\ufeff")  # a byte order mark
