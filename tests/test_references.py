"""Files and modules that docstrings and comments refer to exist."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "loradeploy"
FILES = sorted(PACKAGE.rglob("*.py"))
# Lower-case paths within the package, not paths of URLs or of other packages.
PATH = re.compile(r"(?<![\w./-])(?:[a-z_]\w*/)+\w+\.py\b")
DOTTED = re.compile(r"`((?:[a-z_]\w*\.)+\w+)`")
PACKAGES = {each.parent.name for each in PACKAGE.glob("*/__init__.py")}
DATA = {"yaml", "json", "onnx", "safetensors"}  # `train.yaml` is a file


def prose(file: Path) -> Iterator[str]:
    """Yield the comments and docstrings of a file."""
    source = file.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def has_path(file: Path, path: str) -> bool:
    """Whether `path` is a file relative to one of the parent directories of `file`."""
    return any((folder / path).is_file() for folder in file.parents if folder.is_relative_to(ROOT))


def has_name(name: str) -> bool:
    """Whether `name`, relative to the package, is a module or a name defined in one."""
    place, rest = PACKAGE, name.removeprefix("loradeploy.").split(".")
    while rest and (place / rest[0]).is_dir():
        place /= rest.pop(0)
    if rest and (place / f"{rest[0]}.py").is_file():
        module = place / f"{rest.pop(0)}.py"
    else:
        module = place / "__init__.py"
    source = module.read_text(encoding="utf-8")
    return all(re.search(rf"\b{part}\b", source) for part in rest)


def missing(file: Path, text: str) -> list[str]:
    """Return the references in `text`, a comment or docstring of `file`, that do not exist."""
    names = [
        name
        for name in DOTTED.findall(text)
        if name.partition(".")[0] in {"loradeploy", *PACKAGES} and name.split(".")[-1] not in DATA
    ]
    paths = [path for path in PATH.findall(text) if not has_path(file, path)]
    return paths + [name for name in names if not has_name(name)]


def test_files_and_modules_that_are_named_exist() -> None:
    found = {file: missing(file, "\n".join(prose(file))) for file in FILES}
    assert not {file.relative_to(ROOT): names for file, names in found.items() if names}


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("see adapter/files/peft.py", True),
        ("see files/peft.py", True),
        ("see adapter/peft.py", False),
        ("`adapter.fitting.settle.values_digest`", True),
        ("`adapter.settle.values_digest`", False),
        ("`loradeploy.adapter.fitting.nowhere`", False),
    ],
)
def test_a_reference_to_something_that_was_moved_is_found(text: str, there: bool) -> None:
    assert (missing(PACKAGE / "adapter" / "config.py", text) == []) is there
