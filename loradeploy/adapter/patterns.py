"""Patterns out of configs, with the meaning that Python's `re` gives them in PEFT, in bounded time.

`re` backtracks: ten characters of a pattern can take it years. RE2 takes time in proportion to the
name. What RE2 lacks or reads otherwise (lookaround, references, names that are not ASCII) is
matched by `regex`, which can be stopped. All patterns of one config share `SECONDS`.
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
SECONDS: Final = 10.0  # of the processor, for all names that a config is asked about
_SECONDS_EACH: Final = 1.0
_MEMORY: Final = 1 << 20  # for RE2's program and automaton of one pattern

# A name's end as PEFT's defaults and this project write it: letters, and dots as they are.
_NAME: Final = re.compile(r"\^?(?:[A-Za-z0-9_.]|\\[.\-_])+")
_OPEN_REPEAT: Final = re.compile(r"\{,(\d*)\}")


def is_name(pattern: str) -> bool:
    """Whether `pattern` is the name of a module, or its end, rather than an expression."""
    return _NAME.fullmatch(pattern) is not None


def check_patterns(patterns: Iterable[str]) -> str | None:
    """What is wrong with the first of `patterns` that cannot be matched; None if all can."""
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
    """Matches the patterns of one config, as long as they take no longer than `SECONDS` in all."""

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
        flags = re.match(r"\(\?[aiLmsux]+\)", pattern)  # which may stand at the beginning alone
        head = flags[0] if flags else ""
        return self.match(rf"{head}(?:{pattern[len(head) :]})\Z", name) is not None


class Ends:
    """Finds the first of many `keys` that PEFT takes for the end of a name.

    PEFT 0.21 (utils.other.get_pattern_key): `(.*\\.)?(key)$`. Keys that are names are looked up:
    a dot in one stands for any character, so those with dots at the same places share a table.
    """

    def __init__(self, keys: Iterable[str], matcher: Matcher) -> None:
        self._keys = tuple(keys)
        self._matcher = matcher
        self._expressions = [n for n, key in enumerate(self._keys) if not is_name(key)]
        # By length and the places of dots: what stands elsewhere, and the first key with it.
        self._tables: dict[int, dict[tuple[int, ...], dict[tuple[bool, str], int]]] = {}
        for number, key in enumerate(self._keys):
            if is_name(key):
                whole, letters, dots = _read_name(key)
                table = self._tables.setdefault(len(letters), {}).setdefault(dots, {})
                table.setdefault((whole, _without(letters, dots)), number)

    def __reduce__(self) -> tuple[type[Ends], tuple[tuple[str, ...], Matcher]]:
        return Ends, (self._keys, self._matcher)

    def first(self, name: str) -> str | None:
        """The first key that is the end of `name` after a dot, or the whole."""
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
        for start in (0, *(place + 1 for place, letter in enumerate(name) if letter == ".")):
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
    """Whether `key` is for a whole name, its characters, and which of them are dots unescaped."""
    whole = key.startswith("^")
    letters: list[str] = []
    dots = []
    escaped = False
    for letter in key[whole:]:
        if letter == "\\" and not escaped:
            escaped = True
            continue
        if letter == "." and not escaped:
            dots.append(len(letters))
        letters.append(letter)
        escaped = False
    return whole, "".join(letters), tuple(dots)


def _without(letters: str, places: tuple[int, ...]) -> str:
    pieces = []
    start = 0
    for place in places:
        pieces.append(letters[start:place])
        start = place + 1
    return "\0".join((*pieces, letters[start:]))


@lru_cache(maxsize=4 * MAX_PATTERNS)
def _compiled(pattern: str) -> tuple[Any, Any]:
    """`pattern` for RE2, None where that reads it otherwise, and for `regex`.

    Raises:
        ValueError: it is no regular expression, or neither of them has it.
    """
    import re2
    import regex

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # sets that other versions read in another way
            re.compile(pattern)
        slow = regex.compile(pattern, regex.VERSION0)
    except (re.error, regex.error, RecursionError, OverflowError, Warning) as problem:
        raise ValueError(f"is no regular expression: {first_line(problem)}") from None
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
    """`pattern` as RE2 spells it; None where it would be taken for another.

    What RE2 refuses (lookaround, possessive repetitions) need not be found here.
    """
    if not (pattern.isascii() and pattern.isprintable()):
        return None
    made = []
    in_set = False
    place = 0
    while place < len(pattern):
        letter = pattern[place]
        piece = letter
        if letter == "\\":
            piece = pattern[place : place + 2]
            if piece[1:].isdigit() or piece in (r"\v", r"\N"):  # references; octal
                return None
            made.append(r"\z" if piece == r"\Z" else piece)
        elif in_set:
            in_set = letter != "]"
            made.append(letter)
        elif letter == "[":
            piece = re.match(r"\[\^?\]?", pattern[place:])[0]  # type: ignore[index]
            in_set = True
            made.append(piece)
        elif letter == "{" and (found := _OPEN_REPEAT.match(pattern, place)):
            piece = found[0]
            made.append(f"{{0,{found[1]}}}")
        else:
            made.append(letter)
        place += len(piece)
    return "".join(made)
