"""Numbers as users give them, checked and converted to Python's types.

numpy's numbers are accepted, by the abstract types of `numbers`, without an import of numpy.
"""

from __future__ import annotations

import numbers
from typing import Final

from loradeploy.errors import UsageError, shown

_LARGEST: Final = 2**63 - 1


def checked_count(name: str, value: object, least: int = 1) -> int:
    """Return the integer `value` as an int of Python: sums of numpy's small ones overflow.

    Raises:
        UsageError: not an integer, below `least`, or of more than 64 bits; `name` is for the
            message.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    count = int(value) if whole else least - 1  # type: ignore[call-overload]
    if count < least:
        raise UsageError(f"{name} is {shown(value)}: give {least} or more")
    if count > _LARGEST:
        raise UsageError(f"{name} is {shown(value)}: give at most 2**63 - 1")
    return count


def checked_number(value: object) -> float | None:
    """The number `value` as a float of Python; None if it is no number, or too large for one."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
