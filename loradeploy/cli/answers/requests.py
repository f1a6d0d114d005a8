"""Read the prompts of `loradeploy run`, and load the adapters that they name."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loradeploy.errors import (
    DataError,
    LoraDeployError,
    UnknownAdapterError,
    listed_names,
    shown,
)
from loradeploy.files import MAX_TEXT_BYTES
from loradeploy.paths import resolved

if TYPE_CHECKING:
    from loradeploy.runtime.adapters.resident import AdapterSpec
    from loradeploy.runtime.prompts import InputPrompt
    from loradeploy.runtime.session import AdapterSession


# How the runtime names a prompt: by its number, from 1.
_NUMBERED: Final = re.compile(r"\b(?:prompt|text) (?P<number>\d+)\b")


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


@contextmanager
def naming_lines(requests: Sequence[InputPrompt]) -> Iterator[None]:
    """Let errors that name a prompt by its number name the line that it was read from."""
    try:
        yield
    except LoraDeployError as problem:
        message = str(problem)
        found = _NUMBERED.search(message)
        number = 0 if found is None else int(found["number"])
        where = requests[number - 1].where if 0 < number <= len(requests) else None
        if found is not None and where is not None:
            problem.args = (f"{message[: found.start()]}{where}{message[found.end() :]}",)
        raise


def _standard_input() -> str:
    try:
        content = sys.stdin.read(MAX_TEXT_BYTES + 1)
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"standard input cannot be read as UTF-8 text: {problem}") from None
    if len(content) > MAX_TEXT_BYTES:
        raise DataError(f"standard input has more than the {MAX_TEXT_BYTES:,} characters of a run")
    return content.removeprefix("\ufeff")  # a byte order mark
