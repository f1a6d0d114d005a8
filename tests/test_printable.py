"""Untrusted text reaches terminals and pages without control characters or hidden characters."""

from __future__ import annotations

import ast
import json
import logging
import unicodedata
from pathlib import Path

import pytest

from loradeploy.errors import (
    LoraDeployError,
    OutputError,
    UnknownAdapterError,
    first_line,
)
from loradeploy.printable import as_json, as_markdown, logger_of, one_line, printable, readable

PACKAGE = Path(__file__).parent.parent / "loradeploy"
# Escapes that set a terminal's title and clipboard, the C1 form of ESC [, an overwritten line,
# reversed text, invisible characters, a forged log line, a file name byte that is not UTF-8,
# characters that XML cannot contain.
ACTIVE = [
    "\x1b]0;title\x07", "\x1b]52;c;QQ==\x07", "\x9b2J", "\rok", "\x08\x08", "\x7f", "\0",
    "\u202egnp", "\u2066", "\u200b", "\u2060", "\ufeff", "\u00ad", "\u3164", "\u2800", "\ufe0f",
    "\u034f", "\U000e0041", "\u2028", "\u2029", "\x85", "\n2026-01-01 INFO all is well", "\x0b",
    "\udcff", "\ufffe", "\uffff", "\U0001ffff",
]  # fmt: skip
VISIBLE = ["plain", "Füße", "東京", "🦙", "a b", "\u00a0", "\u3000", "«a|b»", "\\x1b", "e\u0301"]
# Format characters that are visible: signs before a number in Arabic, Syriac and Kaithi.
DRAWN = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}


def test_every_control_and_format_character_is_escaped() -> None:
    for number in range(0x110000):
        character = chr(number)
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            shown = printable(character)
            assert number in DRAWN or (shown.isascii() and shown.startswith("\\")), hex(number)


@pytest.mark.parametrize("text", ACTIVE, ids=ascii)
def test_control_and_invisible_characters_are_escaped_and_the_rest_is_kept(text: str) -> None:
    shown = printable(f"a{text}b")
    assert shown != f"a{text}b" and shown[0] + shown[-1] == "ab"
    assert printable(shown) == shown
    assert shown.encode().decode("unicode_escape").encode("utf-16", "surrogatepass") == (
        f"a{text}b".encode("utf-16", "surrogatepass")
    )


@pytest.mark.parametrize("text", VISIBLE)
def test_visible_characters_are_not_changed(text: str) -> None:
    assert printable(text) == readable(text) == one_line(text) == text


def test_generated_text_keeps_the_format_characters_that_scripts_and_emoji_need() -> None:
    kept = "می\u200cخواهم ❤\ufe0f 👩\u200d🔬 \u200fשלום\tx\ny"
    assert readable(kept) == kept
    acting = [text for text in ACTIVE if unicodedata.category(text[0]) != "Cf" and text[0] != "\n"]
    for text in ("\x1b[2J", "\u202e", "\u2066", "\U000e0041", "\x9b", *acting[:7]):
        assert readable(text) != text


def test_one_line_is_a_single_line_for_every_reader() -> None:
    text = "a\nb\rc\x0bd\x0ce\x1cf\x85g\u2028h\u2029i"
    assert len(one_line(text).splitlines()) == 1
    assert one_line("\x1b[1mtext") == "\x1b[1mtext"  # only line breaks are escaped


@pytest.mark.parametrize("text", ACTIVE, ids=ascii)
def test_json_escapes_hidden_characters_and_loses_nothing(text: str) -> None:
    message = as_json({text: [text]}, indent=2)
    assert printable(message, lines=True) == message
    assert json.loads(message) == {text: [text]}


def test_markdown_shows_names_as_they_are() -> None:
    name = "a|b`c`_d_ *e* [f](http://g) <img src=x> &#x202e; ~~h~~ #1 $i$ www.j \\ \x1b\nk"
    shown = as_markdown(name)
    assert "\n" not in shown and "\x1b" not in shown
    for mark in "|`*[]<>&~#$_":
        assert shown.count(f"\\{mark}") == shown.count(mark) == name.count(mark)
    assert "http://" not in shown and "www." not in shown


@pytest.mark.parametrize("text", ACTIVE, ids=ascii)
def test_messages_of_errors_are_printable_and_one_line(text: str) -> None:
    problems: list[LoraDeployError] = [LoraDeployError(f"no {text}"), UnknownAdapterError(text)]
    problems.append(OutputError(f"/a{text}", "full"))
    for problem in problems:
        assert printable(str(problem)) == str(problem)
    message = first_line(ValueError(f"\x1b[31mred\x1b[0m {text}"))
    assert message.startswith("red") and printable(message) == message


def test_lines_of_logs_are_printable(caplog: pytest.LogCaptureFixture) -> None:
    logger = logger_of("loradeploy.test")
    assert logger is logger_of("loradeploy.test") and len(logger.filters) == 1
    with caplog.at_level(logging.WARNING, "loradeploy.test"):
        logger.warning("left out: %s, 100 %%", "\x1b[2J\nINFO fine")
    assert caplog.messages == ["left out: \\x1b[2J\\nINFO fine, 100 %"]


# Files that may call these functions directly, and why.
ALLOWED = {
    "printable.py": {"getLogger"},
    "lora/quiet.py": {"getLogger"},  # levels of other libraries' loggers
    "export/passes/precision/quantize.py": {"getLogger"},
    "export/read/regular.py": {"getLogger"},  # a filter of onnx-ir's logger
    "cli/main.py": {"getLogger", "echo"},
    "cli/console.py": {"getLogger", "echo"},
    "cli/answers/printer.py": {"echo"},  # JSON by the rule
    "cli/train.py": {"echo"},  # YAML and examples by the rule
}


def test_nothing_else_writes_to_a_terminal_directly() -> None:
    """`logging.getLogger(__name__)` and `click.echo` have replacements that escape."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = ast.unparse(node.func)
                if name in ("logging.getLogger", "click.echo", "click.secho", "warnings.warn"):
                    kind = node.func.attr
                    if kind not in ALLOWED.get(place, ()):
                        found.add(f"{place}: {name}")
    assert not found
