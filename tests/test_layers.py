"""The import layers: the serving packages import without PyTorch, transformers or onnx."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

HEAVY = {
    "accelerate",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "peft",
    "torch",
    "transformers",
}

# Any import of a blocked package fails, whichever module imports it and whenever.
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(HEAVY)}:
            raise ImportError(f"{{name}} is not installed here")

sys.meta_path.insert(0, Blocked())
"""

# Modules that need a package of another extra.
OF_EXTRAS = {"loradeploy.serve.replicas"}


def run(code: str) -> str:
    """Run `code` in a fresh interpreter and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules(package: str) -> list[str]:
    """Every module of `loradeploy.<package>`."""
    folder = ROOT / "loradeploy" / package
    names = sorted(file.relative_to(ROOT).with_suffix("").parts for file in folder.rglob("*.py"))
    return [".".join(name).removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("package", ["adapter", "bundle", "runtime", "serve", "cli"])
def test_a_serving_machine_can_import_every_module(package: str) -> None:
    found = [module for module in modules(package) if module not in OF_EXTRAS]
    run(BLOCK + "".join(f"import {module}\n" for module in found))


def test_importing_loradeploy_imports_only_the_standard_library() -> None:
    foreign = run(
        "import sys; before = set(sys.modules); import loradeploy\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names) - {'loradeploy'}))"
    )
    assert foreign.split() == []
