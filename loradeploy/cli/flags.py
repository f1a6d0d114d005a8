"""Replace Python parameters in messages of the library by flags of the command line.

The library names parameters in backticks: `merge`, `branches=False`, `layout="rows"`. On the
command line they become --merge, --no-branches, --layout rows.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Mapping
from typing import Any, Final

import click

# A parameter in backticks, with or without a value. Longer values are not replaced.
_PARAMETER: Final = re.compile(r"`([a-z][a-z_]*)(?:=([^`]{1,120}))?`")


def with_flags(message: str, verb: str | None, verbs: Mapping[str, str]) -> str:
    """`message` with parameters in backticks replaced by flags, if there are such flags.

    Flags of `verb` have precedence over those of other commands, which a message may name too, such
    as an option of the export for an error of run.
    """

    def flag(match: re.Match[str]) -> str:
        option = _option(match[1], [v for v in (verb, *verbs) if v is not None])
        shown = None if option is None else _typed(option, match[2])
        return match[0] if shown is None else shown

    return _PARAMETER.sub(flag, message)


def _option(name: str, verbs: list[str]) -> click.Option | None:
    """The option that sets the parameter `name`; `adapters` is also set by one named `adapter`."""
    for verb in verbs:
        command: click.Command = importlib.import_module(f"loradeploy.cli.{verb}").command
        options = {o.name: o for o in command.params if isinstance(o, click.Option)}
        for known in (name, name.removesuffix("s"), f"{name}s"):
            if known in options:
                return options[known]
    return None


def _typed(option: click.Option, value: str | None) -> str | None:
    """The command line arguments that set `option` to `value`; None if none do."""
    flag = option.opts[0]
    if value is None:
        return flag
    parsed = _parsed(value)
    if option.is_flag:
        return flag if parsed is True else next(iter(option.secondary_opts), None)
    if isinstance(parsed, Mapping):
        parsed = [f"{name}={size}" for name, size in parsed.items()]
    if isinstance(parsed, list | tuple):
        if option.multiple:
            return " ".join(f"{flag} {item}" for item in parsed)
        parsed = ",".join(map(str, parsed))
    return f"{flag} {parsed}"


def _parsed(value: str) -> Any:
    """The value of a Python literal; other texts, such as DIR, unchanged."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
