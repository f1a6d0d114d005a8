"""The serving side works in a process without torch, transformers and onnx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "peft",
    "datasets",
    "accelerate",
)

_PROGRAM = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Block())
{body}
assert not set(sys.modules) & {blocked}, set(sys.modules) & {blocked}
"""

_GENERATE = """
from loradeploy.runtime.tasks.generation import TextGenerator
from loradeploy.runtime.session import AdapterSession

session = AdapterSession(sys.argv[1])
session.load("small", sys.argv[2])
generator = TextGenerator(session)
for result in generator.generate(["The bank", "The bank"], [None, "small"], chat=True):
    print(result.token_ids)
"""

_CLASSIFY = """
from loradeploy.runtime.tasks.classification import TextClassifier
from loradeploy.runtime.session import AdapterSession

session = AdapterSession(sys.argv[1])
session.load("small", sys.argv[2])
for result in TextClassifier(session)(["one", "two"], "small"):
    print(result.label, result.score)
"""


def _run(body: str, *arguments: Path) -> list[str]:
    program = _PROGRAM.format(blocked=set(BLOCKED), body=body)
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_process_without_torch_generates(
    tiny_llama_bundle: Path, llama_adapters: dict[str, Path]
) -> None:
    base, small = _run(_GENERATE, tiny_llama_bundle, llama_adapters["small"])
    assert base != small


def test_a_process_without_torch_classifies(
    tiny_bert_bundle: Path, bert_adapters: dict[str, Path]
) -> None:
    one, two = _run(_CLASSIFY, tiny_bert_bundle, bert_adapters["small"])
    assert one != two


def test_running_one_prompt_imports_only_what_it_uses(tiny_llama_bundle: Path) -> None:
    """Imports of `loradeploy run` add to its time to the first token."""
    body = """
from loradeploy.cli.main import main
sys.argv = ["loradeploy", "run", sys.argv[1], "The bank", "--max-new-tokens", "1"]
try:
    main()
except SystemExit as end:
    assert not end.code
unused = {"asyncio", "importlib.metadata", "jinja2", "loradeploy.runtime.tasks.speech"}
print()
print(*(unused & set(sys.modules)))
"""
    assert _run(body, tiny_llama_bundle)[-1] == ""


@pytest.mark.parametrize("name", BLOCKED)
def test_blocked_packages_cannot_be_imported(name: str) -> None:
    with pytest.raises(AssertionError, match="is blocked"):
        _run(f"import {name}")
