"""Escape characters of untrusted text before it is printed, logged or rendered.

Names and values come from adapters, bundles, prompts and other untrusted files. Characters in them
may color a terminal, set its title or clipboard, move its cursor, end a line of a log, reverse the
order of the following text (U+202E), or be invisible, so that two names look alike. Such characters
are written as escapes of Python, \\x1b or \\u202e:

    printable(text)    names, values, messages, tables, logs, reports: escapes all such characters
    readable(text)     texts that a model generates: keeps characters that scripts and emoji need
    as_json(value)     JSON: uses escapes of JSON, so that the value is preserved
    as_markdown(text)  Markdown: also escapes its syntax
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any, Final

# C0 except tab and line feed, DEL, C1; line separators; unpaired surrogates; changes of the writing
# direction; tags and other annotations; noncharacters, which XML does not allow.
_HARM: Final = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e\u2066-\u206f\ufeff"
    r"\ufff0-\ufffb\ufdd0-\ufdef\ufffe\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
) + "".join(f"\\U{plane:04x}fffe\\U{plane:04x}ffff" for plane in range(1, 17))
# Invisible characters: Unicode's Default_Ignorable_Code_Point, and the Braille blank.
_HIDDEN: Final = (
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2060-\u2065\u2800"
    r"\u3164\ufe00-\ufe0f\uffa0\U00013430-\U0001343f\U000e0100-\U000e01ef"
)
_NOT_READABLE: Final = re.compile(f"[{_HARM}]")
_NOT_PRINTABLE: Final = re.compile(f"[{_HARM}{_HIDDEN}\\t\\n]")
_NOT_PRINTABLE_LINES: Final = re.compile(f"[{_HARM}{_HIDDEN}]")
# Characters that some readers take for the end of a line.
_BREAKS: Final = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
# Emphasis, links, tables, HTML, entities, formulas, and addresses that GitHub turns into links.
_MARKDOWN: Final = re.compile(r"([\\`*_\[\]<>|&~#$]|(?<=[a-z]):(?=//)|(?<=www)\.)", re.IGNORECASE)


def printable(text: str, *, lines: bool = False) -> str:
    """`text` with control characters and invisible characters escaped.

    `lines`: whether to keep line feeds and tabs.
    """
    return (_NOT_PRINTABLE_LINES if lines else _NOT_PRINTABLE).sub(_escaped, text)


def readable(text: str) -> str:
    """A generated text, made safe for a terminal.

    Keeps tabs, line feeds, joiners, direction marks and variation selectors, which scripts and
    emoji need.
    """
    return _NOT_READABLE.sub(_escaped, text)


def one_line(text: str) -> str:
    """`text` with line breaks of any kind escaped, for output with one result per line."""
    return _BREAKS.sub(_escaped, text)


def as_json(value: object, **options: Any) -> str:
    """`value` as JSON, with invisible characters escaped; parsing restores the value.

    `options`: those of json.dumps.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    return _NOT_PRINTABLE_LINES.sub(lambda match: json.dumps(match[0])[1:-1], text)


def as_markdown(text: str) -> str:
    """`text` as one line of Markdown that renders as the same text."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(text.split())))


def logger_of(module: str) -> logging.Logger:
    """The logger of a module, with messages made printable."""
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
