"""The Jinja environment of chat templates: the names and filters that transformers gives them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.ext import Extension

from loradeploy.bundle.text.template_limits import LimitedEnvironment, LimitError


@cache
def environment() -> LimitedEnvironment:
    """The environment, in Jinja's immutable sandbox and with limits."""
    made = LimitedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    made.add_filter("tojson", _tojson)
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    made.globals["namespace"] = _Namespace
    return made


def joined(pieces: Iterable[str], most: int) -> str:
    """`pieces` in one text of at most `most` characters."""
    found: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > most:
            raise LimitError(f"it writes more than {most:,} characters")
        found.append(piece)
    return "".join(found)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, used to mark answers: renders its body."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names with a leading underscore, which could expose internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # namespace(self=…) is allowed
        jinja2.utils.Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _refuse_internal(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_internal(name)
        super().__setitem__(name, value)


def _refuse_internal(name: str) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the name {name!r} is not allowed in a namespace")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if re.search(r"\d{4}", form):  # a field width, to which the C library would pad
        raise LimitError("it pads the time to a width that is too large")
    return datetime.now().strftime(form)
