"""Match the patterns of configs as PEFT does with Python's `re`, but in bounded time.

`re` backtracks: a pattern of ten characters can take years. RE2 takes time proportional to the
name. Patterns that RE2 lacks or interprets differently (lookaround, references, names that are not
ASCII) are matched by `regex`, which has a timeout. All patterns of one config share `SECONDS`.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

from loradeploy.errors import AdapterError, first_line, shown

MAX_PATTERN_LENGTH: Final = 4096
MAX_PATTERNS: Final = 1000
SECONDS: Final = 10.0  # CPU time for all names that are matched with one config
_SECONDS_EACH: Final = 1.0
_MEMORY: Final = 1 << 20  # for RE2's program and automaton of one pattern

# The ending of a name as PEFT's defaults and this project write it: letters, and dots that are not
# escaped.
_NAME: Final = re.compile(r"\^?(?:[A-Za-z0-9_.]|\\[.\-_])+")
_OPEN_SET: Final = re.compile(r"\[\^?\]?")
_OPEN_REPEAT: Final = re.compile(r"\{,(\d*)\}")


def is_name(pattern: str) -> bool:
    """Whether `pattern` is a module name or its ending, not a regular expression."""
    return _NAME.fullmatch(pattern) is not None


def endings(name: str) -> list[str]:
    """The dotted `name` and its endings after each dot, the longest first."""
    return [name, *(name[index + 1 :] for index, letter in enumerate(name) if letter == ".")]


def check_patterns(patterns: Iterable[str]) -> str | None:
    """Why the first unusable pattern of `patterns` cannot be matched; None if all can."""
    expressions = 0
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN_LENGTH:
            return f"has a pattern of {len(pattern):,} characters"
        if is_name(pattern):
            continue
        expressions += 1
        if expressions > MAX_PATTERNS:
            return f"has more than {MAX_PATTERNS:,} regular expressions"
        try:
            _compiled(pattern)
        except ValueError as problem:
            return f"has the pattern {shown(pattern)}, which {first_line(problem)}"
    return None


class Matcher:
    """Matches the patterns of one config, for at most `SECONDS` in total."""

    def __init__(self) -> None:
        self._left = SECONDS

    def __reduce__(self) -> tuple[type[Matcher], tuple[()]]:
        return Matcher, ()

    def match(self, pattern: str, name: str) -> Any:
        """As `re.match(pattern, name)`.

        Raises:
            AdapterError: the pattern cannot be matched, or takes too long.
        """
        try:
            fast, slow = _compiled(pattern)
        except ValueError as problem:
            raise AdapterError(f"the pattern {shown(pattern)} {first_line(problem)}") from None
        started = time.thread_time()
        try:
            if fast is not None and name.isascii() and name.isprintable():
                return fast.match(name)
            return slow.match(name, timeout=max(min(self._left, _SECONDS_EACH), 1e-3))
        except TimeoutError:
            self._left = 0.0
        finally:
            self._left -= time.thread_time() - started
            if self._left <= 0:
                raise AdapterError(
                    f"the pattern {shown(pattern)} takes too long on {shown(name)}: write one"
                    " without repetitions inside repetitions, or a list of modules"
                )

    def fullmatch(self, pattern: str, name: str) -> bool:
        """Whether `re.fullmatch(pattern, name)` is a match."""
        flags = re.match(r"\(\?[aiLmsux]+\)", pattern)  # only valid at the beginning
        head = flags[0] if flags else ""
        return self.match(rf"{head}(?:{pattern[len(head) :]})\Z", name) is not None


class Ends:
    """Finds the first of many `keys` that matches the ending of a name, by the rule of PEFT.

    PEFT 0.21 (utils.other.get_pattern_key): `(.*\\.)?(key)$`. Keys that are names are found in
    tables: a dot in one matches any character, so keys with dots at the same positions share one.
    """

    def __init__(self, keys: Iterable[str], matcher: Matcher) -> None:
        self._keys = tuple(keys)
        self._matcher = matcher
        self._expressions = [n for n, key in enumerate(self._keys) if not is_name(key)]
        # length → positions of dots → (full name only, other characters) → first key.
        self._tables: dict[int, dict[tuple[int, ...], dict[tuple[bool, str], int]]] = {}
        for number, key in enumerate(self._keys):
            if is_name(key):
                full, letters, dots = _read_name(key)
                table = self._tables.setdefault(len(letters), {}).setdefault(dots, {})
                table.setdefault((full, _without(letters, dots)), number)

    def __reduce__(self) -> tuple[type[Ends], tuple[tuple[str, ...], Matcher]]:
        return Ends, (self._keys, self._matcher)

    def first(self, name: str) -> str | None:
        """The first key that matches `name`, or its ending after a dot."""
        if not self._keys:
            return None
        if not (name.isascii() and name.isprintable()):
            numbers: Iterable[int] = range(len(self._keys))
            best = None
        else:
            best = self._name(name)
            numbers = self._expressions
        for number in numbers:
            if best is not None and number > best:
                break
            if self._matcher.match(rf"(.*\.)?({self._keys[number]})$", name):
                return self._keys[number]
        return None if best is None else self._keys[best]

    def _name(self, name: str) -> int | None:
        found = []
        for start in (0, *(index + 1 for index, letter in enumerate(name) if letter == ".")):
            end = name[start:]
            for dots, table in self._tables.get(len(end), {}).items():
                letters = _without(end, dots)
                found += [
                    n
                    for w in (False, True)
                    if (n := table.get((w, letters))) is not None and not (w and start)
                ]
        return min(found, default=None)


def _read_name(key: str) -> tuple[bool, str, tuple[int, ...]]:
    """Whether `key` matches full names only, its characters, and the indices of unescaped dots."""
    full = key.startswith("^")
    letters: list[str] = []
    dots = []
    escaped = False
    for letter in key[full:]:
        if letter == "\\" and not escaped:
            escaped = True
            continue
        if letter == "." and not escaped:
            dots.append(len(letters))
        letters.append(letter)
        escaped = False
    return full, "".join(letters), tuple(dots)


def _without(letters: str, positions: tuple[int, ...]) -> str:
    pieces = []
    start = 0
    for position in positions:
        pieces.append(letters[start:position])
        start = position + 1
    return "\0".join((*pieces, letters[start:]))


@lru_cache(maxsize=4 * MAX_PATTERNS)
def _compiled(pattern: str) -> tuple[Any, Any]:
    """`pattern` compiled by RE2 (None if RE2 would interpret it differently) and by `regex`.

    Raises:
        ValueError: it is not a regular expression, or `regex` does not support it.
    """
    import re2
    import regex

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # sets that other versions interpret differently
            re.compile(pattern)
        slow = regex.compile(pattern, regex.VERSION0)
    except (re.error, regex.error, RecursionError, OverflowError, Warning) as problem:
        raise ValueError(f"is not a regular expression: {first_line(problem)}") from None
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MEMORY
    text = _for_re2(pattern)
    if text is None:
        return None, slow
    try:
        return re2.compile(text, options), slow
    except re2.error:
        return None, slow


def _for_re2(pattern: str) -> str | None:
    """`pattern` in the syntax of RE2; None if RE2 would interpret it differently.

    Syntax that RE2 refuses (lookaround, possessive repetitions) need not be detected here.
    """
    if not (pattern.isascii() and pattern.isprintable()):
        return None
    made = []
    in_set = False
    index = 0
    while index < len(pattern):
        letter = pattern[index]
        piece = letter
        if letter == "\\":
            piece = pattern[index : index + 2]
            if piece[1:].isdigit() or piece in (r"\v", r"\N"):  # references; octal
                return None
            made.append(r"\z" if piece == r"\Z" else piece)
        elif in_set:
            in_set = letter != "]"
            made.append(letter)
        elif found := _OPEN_SET.match(pattern, index):
            piece = found[0]
            in_set = True
            made.append(piece)
        elif letter == "{" and (found := _OPEN_REPEAT.match(pattern, index)):
            piece = found[0]
            made.append(f"{{0,{found[1]}}}")
        else:
            made.append(letter)
        index += len(piece)
    return "".join(made)
