"""JSON that somebody else wrote, with one meaning, and nothing that later steps stumble over.

numbers     whole ones that 64 bits hold are int, all others float; none is without end, and none
            is infinite or NaN unless that is asked for (configs of models have such)
names       an object tells each name once, or the same thing twice
texts       no half of a surrogate pair, which no file and no terminal can hold
nesting     at most `MAX_DEPTH` objects and lists within each other
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, Final

from loradeploy.errors import shown

MAX_DEPTH: Final = 100

_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
_LARGEST: Final = 2**63 - 1
_DIGITS: Final = 18  # that 64 bits hold for certain


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """The value in the JSON `text`; bytes are UTF-8.

    `finite`: whether Infinity and NaN, which are no JSON but which Python writes, are refused.

    Raises:
        ValueError: it is no such JSON; the message is one line.
    """
    try:
        source = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(
            source,
            parse_int=_whole,
            parse_float=_number if finite else float,
            parse_constant=_refuse_constant if finite else float,
            object_pairs_hook=_object,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    # Most texts cannot be too deep, or hold a surrogate at all.
    deep = source.count("[") + source.count("{") > MAX_DEPTH
    if deep or _SURROGATE.search(source):
        _check(value)
    return value


_TOO_DEEP: Final = f"more than {MAX_DEPTH} objects and lists are nested"


def _whole(digits: str) -> int | float:
    if len(digits) <= _DIGITS:
        return int(digits)
    if len(digits) <= _DIGITS + 2 and -_LARGEST - 1 <= (number := int(digits)) <= _LARGEST:
        return number
    return _number(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"a number of {len(digits)} characters is too large")
    return number


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        for name, value in pairs:
            if made[name] != value:
                raise ValueError(f"an object has two values of {shown(name)}")
    return made


def _check(value: Any) -> None:
    """Raise ValueError where `value` is nested too deeply or holds half a surrogate pair."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return
        for text in _texts(level):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{ascii(text)[:60]} holds half a surrogate pair") from None
        level = [inner for outer in level for inner in _inside(outer)]
    raise ValueError(_TOO_DEEP)


def _inside(value: Any) -> list[Any]:
    """What a list or an object holds, of lists, objects and texts."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _texts(values: list[Any]) -> Iterator[str]:
    return (value for value in values if isinstance(value, str))
