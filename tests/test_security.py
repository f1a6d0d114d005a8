"""Every guarantee of docs/security.md names the tests that check it, and they exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
GUARANTEES = PAGE.partition("## Guarantees")[2].partition("## Reporting")[0]
ROWS = [
    line
    for line in GUARANTEES.splitlines()
    if line.startswith("| ") and not line.startswith("| Guarantee")
]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", GUARANTEES)))


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_the_tests_that_the_page_names_exist(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert [name for of, name in NAMED if of == file and name not in there] == []


def test_every_guarantee_names_a_test() -> None:
    assert len(ROWS) >= 10
    assert [row for row in ROWS if "::test_" not in row] == []


def test_the_readme_and_contributing_link_to_the_page() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        assert "docs/security.md" in (ROOT / name).read_text(encoding="utf-8"), name
