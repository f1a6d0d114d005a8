"""Untrusted names and values are escaped in terminals, logs and reports."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from loradeploy.cli.console import say_text
from loradeploy.parity.report.html import html
from loradeploy.parity.report.results import ParityReport
from loradeploy.parity.report.table import print_report
from loradeploy.parity.report.writers import junit, markdown, write_report
from loradeploy.printable import printable
from tests.cli.calling import Run
from tests.parity.reports import FULL

NAME = "x\x1b]0;t\x07\x9b2J\u202e\u200b\ufe0f\u2028\0\ufffe\udcff|`<b>&#x202e;\r\nINFO fine"
SHOWN = printable(NAME)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function `write(**config)` that writes an adapter of one module."""

    def write(**config: Any) -> Path:
        place = tmp_path / "adapter"
        place.mkdir(exist_ok=True)
        name = "base_model.model.m.q_proj.lora_"
        tensors = {f"{name}A.weight": np.ones((2, 8)), f"{name}B.weight": np.ones((8, 2))}
        save_file(
            {name: values.astype(np.float32) for name, values in tensors.items()},
            place / "adapter_model.safetensors",
            metadata={"labels": "x\x1b[2J"},
        )
        given = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
        (place / "adapter_config.json").write_text(json.dumps({**given, **config}))
        return place

    return write


def test_inspect_escapes_untrusted_names(run: Run, write: Callable[..., Path]) -> None:
    name = NAME.replace("\udcff", "")  # JSON with a lone surrogate is refused
    place = write(base_model_name_or_path=name)
    status, out, err = run("inspect", place)
    assert status == 0, err
    assert printable(name) in out and printable(out, lines=True) == out
    status, out, err = run("inspect", place, "--json")
    assert status == 0, err
    assert json.loads(out)["base_model"] == name and printable(out, lines=True) == out


def test_errors_escape_untrusted_names(
    run: Run, write: Callable[..., Path], tmp_path: Path
) -> None:
    for place in (write(**{NAME: 1}), tmp_path / "no\x1b[2J\u202e"):
        status, _, err = run("inspect", place)
        assert status == 2 and "\\x1b" in err
        assert err.count("\n") == 1 and printable(err, lines=True) == err


@pytest.mark.parametrize(
    ("terminal", "message"), [(True, "a\\x1b[2J\\u202e❤\ufe0f"), (False, None)]
)
def test_control_characters_of_generated_text_do_not_reach_a_terminal(
    terminal: bool, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a\x1b[2J\u202e❤\ufe0f"
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stdout", out)
    say_text(text, end="")
    assert out.getvalue() == (message or text)  # a pipe gets the text unchanged


# -- reports -----------------------------------------------------------------------------------


def _with_names(value: Any) -> Any:
    """Return `value` with control characters appended to every untrusted text in it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {"outcome", "mode", "phase", "metric", "provider", "optimization", "backend"}
        changed = {
            field.name: _with_names(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init and field.name not in own
        }
        return dataclasses.replace(value, **changed)
    if isinstance(value, tuple):
        return tuple(map(_with_names, value))
    return value + NAME if isinstance(value, str) else value


@pytest.fixture(scope="module")
def report() -> ParityReport:
    changed: ParityReport = _with_names(FULL)
    return changed


def test_junit_is_valid_xml_and_hides_nothing(report: ParityReport) -> None:
    text = junit(report)
    assert printable(text, lines=True) == text
    suite = ET.fromstring(text)
    assert SHOWN in suite.get("name", "")
    assert all("\n" not in case.get("name", "") for case in suite)


def test_markdown_keeps_its_table_and_escapes_html(report: ParityReport) -> None:
    text = markdown(report)
    assert printable(text, lines=True) == text
    assert not re.search(r"(?<!\\)(<b>|&#)", text)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "INFO fine" not in [line[:9] for line in text.splitlines()]


def test_the_html_report_escapes_untrusted_names(report: ParityReport) -> None:
    text = html(report)
    assert printable(text, lines=True) == text
    assert "<b>&#" not in text and "&lt;b&gt;&amp;#x202e;" in text


def test_the_table_escapes_untrusted_names(report: ParityReport) -> None:
    out = io.StringIO()
    print_report(report, Console(file=out, color_system=None, width=200))
    assert printable(out.getvalue(), lines=True) == out.getvalue()


@pytest.mark.parametrize("ending", [".json", ".md", ".html", ".xml"])
def test_report_files_have_no_active_characters(
    report: ParityReport, ending: str, tmp_path: Path
) -> None:
    file = tmp_path / f"report{ending}"
    write_report(report, file)
    text = file.read_text(encoding="utf-8")
    assert printable(text, lines=True) == text
    if ending == ".json":
        assert json.loads(text)["bundle"] == report.bundle
