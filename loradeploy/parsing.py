"""Parse untrusted JSON strictly.

numbers     integers that fit in 64 bits are int, all others float; infinite numbers and NaN only if
            requested (model configs have them)
names       a repeated name in an object must have equal values
texts       no unpaired surrogates, which can neither be written nor printed
nesting     at most `MAX_DEPTH` nested objects and lists
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
_DIGITS: Final = 18  # always fit in 64 bits


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """The value in the JSON `text`; bytes are UTF-8, with or without a byte order mark.

    `finite`: whether to refuse Infinity and NaN, which Python writes although they are not JSON.

    Raises:
        ValueError: invalid JSON; the message is one line.
    """
    try:
        source = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(
            source,
            parse_int=_integer,
            parse_float=_number if finite else float,
            parse_constant=_refuse_constant if finite else float,
            object_pairs_hook=distinct,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    # Skips the check for most texts, which cannot be too deep or contain a surrogate.
    deep = source.count("[") + source.count("{") > MAX_DEPTH
    if deep or _SURROGATE.search(source):
        _check(value)
    return value


_TOO_DEEP: Final = f"more than {MAX_DEPTH} objects and lists are nested"


def _integer(digits: str) -> int | float:
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
    raise ValueError(f"{name} is not a number in JSON")


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`, a hook of the json module.

    Raises:
        ValueError: two values of one name.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        for name, value in pairs:
            if made[name] != value:
                raise ValueError(f"an object has two values of {shown(name)}")
    return made


def _check(value: Any) -> None:
    """Raise ValueError if `value` is nested too deeply or contains an unpaired surrogate."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return
        for text in _texts(level):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{ascii(text)[:60]} contains an unpaired surrogate") from None
        level = [inner for outer in level for inner in _inside(outer)]
    raise ValueError(_TOO_DEEP)


def _inside(value: Any) -> list[Any]:
    """The items of a list, or the names and values of an object."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _texts(values: list[Any]) -> Iterator[str]:
    return (value for value in values if isinstance(value, str))
