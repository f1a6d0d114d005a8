"""What of a text may reach a terminal or a page; the one place that decides it.

Names and values come from adapters, bundles, prompts and files that others made. In them a
character may color a terminal, set its title or its clipboard, move its cursor, end a line of a
log, turn the order of what follows (U+202E), or show nothing at all and so make two names look
alike. Such characters are written as Python writes them, \\x1b or \\u202e:

    printable(text)    names, values, messages, tables, logs, reports: all of them
    readable(text)     texts that a model generates: those alone that no script and no emoji needs
    as_json(value)     JSON: its own escapes, so that the value stays what it was
    as_markdown(text)  for Markdown: what it would take for its own is escaped besides
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any, Final

# C0 but for tab and line feed, DEL, C1; separators of lines; surrogates alone; the order of
# writing turned; tags and other annotations; what is no character, which XML cannot hold either.
_HARM: Final = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e\u2066-\u206f\ufeff"
    r"\ufff0-\ufffb\ufdd0-\ufdef\ufffe\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
) + "".join(f"\\U{plane:04x}fffe\\U{plane:04x}ffff" for plane in range(1, 17))
# What shows nothing by itself: Unicode's Default_Ignorable_Code_Point, and Braille's blank.
_HIDDEN: Final = (
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2060-\u2065\u2800"
    r"\u3164\ufe00-\ufe0f\uffa0\U00013430-\U0001343f\U000e0100-\U000e01ef"
)
_NOT_READABLE: Final = re.compile(f"[{_HARM}]")
_NOT_PRINTABLE: Final = re.compile(f"[{_HARM}{_HIDDEN}\\t\\n]")
_NOT_PRINTABLE_LINES: Final = re.compile(f"[{_HARM}{_HIDDEN}]")
# What ends a line for one reader or another.
_BREAKS: Final = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
# Emphasis, links, tables, HTML, entities, formulas; and of GitHub's, addresses that become links.
_MARKDOWN: Final = re.compile(r"([\\`*_\[\]<>|&~#$]|(?<=[a-z]):(?=//)|(?<=www)\.)", re.IGNORECASE)


def printable(text: str, *, lines: bool = False) -> str:
    """`text` with every character escaped that acts on what shows it, or that does not show.

    `lines`: whether it may have several lines, and tabs.
    """
    return (_NOT_PRINTABLE_LINES if lines else _NOT_PRINTABLE).sub(_escaped, text)


def readable(text: str) -> str:
    """A text that was generated, for a terminal.

    Tabs, line feeds, joiners, marks of direction and variants of characters stay: scripts and emoji
    need them.
    """
    return _NOT_READABLE.sub(_escaped, text)


def one_line(text: str) -> str:
    """`text` with all that ends a line escaped, for readers of one result a line."""
    return _BREAKS.sub(_escaped, text)


def as_json(value: object, **options: Any) -> str:
    """`value` as JSON in which nothing is hidden; read again it is the same.

    `options` are json.dumps's.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    return _NOT_PRINTABLE_LINES.sub(lambda match: json.dumps(match[0])[1:-1], text)


def as_markdown(text: str) -> str:
    """`text` as one line of Markdown that shows it as it is."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(text.split())))


def logger_of(module: str) -> logging.Logger:
    """The logger of a module, whose lines are printable wherever they are shown."""
    logger = logging.getLogger(module)
    if not any(isinstance(known, _Printable) for known in logger.filters):
        logger.addFilter(_Printable())
    return logger


class _Printable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), None
        return True


def _escaped(match: re.Match[str]) -> str:
    return repr(match[0])[1:-1] if not match[0].isprintable() else _code(ord(match[0]))


def _code(number: int) -> str:
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"
