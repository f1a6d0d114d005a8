"""The layers hold where it matters: on a machine that has no PyTorch, transformers or onnx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, MakeAdapter

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

# Any import of what is blocked fails, from whatever module and however late.
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(HEAVY)}:
            raise ImportError(f"{{name}} is not installed here")

sys.meta_path.insert(0, Blocked())
"""


def run(code: str, *arguments: object) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
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


@pytest.mark.parametrize("package", ["adapter", "bundle", "runtime", "cli"])
def test_a_serving_machine_can_import_every_module(package: str) -> None:
    run(BLOCK + "".join(f"import {module}\n" for module in modules(package)))


def test_the_package_itself_imports_the_standard_library_alone() -> None:
    foreign = run(
        "import sys; before = set(sys.modules); import loradeploy\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names) - {'loradeploy'}))"
    )
    assert foreign.split() == []


def test_text_comes_from_an_adapter_without_pytorch(
    tiny_llama: Path, tiny_llama_bundle: Path, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(tiny_llama, scale=0.5)
    base, adapted = run(
        BLOCK
        + """
from loradeploy.runtime.generation import TextGenerator
from loradeploy.runtime.session import AdapterSession

session = AdapterSession(sys.argv[1])
session.load("one", sys.argv[2])
texts = ["The match", "The match"]
for result in TextGenerator(session).generate(texts, adapters=[None, "one"], max_new_tokens=8):
    print(repr(result.text))
""",
        tiny_llama_bundle,
        adapter,
    ).splitlines()
    assert base != adapted
