"""The commands and programs of the documentation work, run in the order of the page."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.calling import exit_status
from tests.conftest import ROOT, MakeAdapter
from tests.tolerances import tolerance

README = (ROOT / "README.md").read_text(encoding="utf-8")

# For each document: how many commands and programs it has, what its programs print at the start
# of a line, and which files exist at the end.
DOCUMENTS = {
    "README.md": (8, {"headline", "sport"}, "parity.html"),
    "docs/adapters.md": (2, set(), "adapters/both"),
    "docs/bank.md": (2, {"answered"}, "bundle/model.onnx"),
    "docs/bundles.md": (3, {"largest"}, "bundle/adapters/sport.onnx_adapter"),
    "docs/generation.md": (
        4,
        {"greedy", "several", "score", "piece", "awaited", "event"},
        "bundle/model.onnx",
    ),
    "docs/training.md": (2, set(), "adapters/headline/README.md"),
}

# By page: code appended to its programs, which compares their results with AdapterSession's.
EFFECTS = {
    "docs/generation.md": """
rows = [generator.generate(prompts, adapters=name)[0].text for name in (None, "topic", "sport")]
assert len(set(rows)) == 3, rows
""",
    "docs/bundles.md": """
import loradeploy

expected = loradeploy.AdapterSession("bundle").run(
    ["logits"], feeds, adapters=["topic", None, "sport"]
)[0]
error = np.abs(logits - expected).max()
assert error < {tolerance}, error
effects = np.abs(expected - expected[1]).max(axis=(1, 2))
assert min(effects[0], effects[2]) > 100 * {tolerance}, effects
""",
}


@pytest.fixture
def desk(tiny_llama: Path, make_adapter: MakeAdapter, tmp_path: Path) -> Path:
    """A directory with the files that the README mentions, for a tiny model."""
    (tmp_path / "SmolLM2-135M-Instruct").symlink_to(tiny_llama)
    lessons = [{"prompt": f"Story {n}:", "completion": f" headline {n % 3}"} for n in range(99)]
    write_lines(tmp_path / "headlines.jsonl", lessons)
    stories = [{"prompt": "Story 1:"}, {"prompt": "Story 2:", "adapter": "topic"}]
    write_lines(tmp_path / "stories.jsonl", stories)
    for seed, name in enumerate(("topic", "sport", "headline")):
        make_adapter(tiny_llama, seed=seed, out=tmp_path / "adapters" / name)
    make_adapter(tiny_llama, init_lora_weights="pissa", out=tmp_path / "adapters" / "pissa")
    return tmp_path


def write_lines(file: Path, lines: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(command: list[str]) -> None:
    """Run a `loradeploy` command in this process, which has all imports and cached traces."""
    assert exit_status(*command) == 0, command


def printed_by(program: str, directory: Path) -> str:
    # glibc overwrites freed memory, so that a program that reads it anyway gets other numbers.
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=directory,
        env={**os.environ, "MALLOC_PERTURB_": "165"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{program}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_and_programs_of_a_document_run(
    document: str, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    count, printed, made = DOCUMENTS[document]
    written = (ROOT / document).read_text(encoding="utf-8")
    ran = 0
    for kind, text in re.findall(r"```(console|python)\n(.*?)```", written, re.DOTALL):
        if kind == "python":
            effect = EFFECTS.get(document, "").format(tolerance=tolerance("rows"))
            lines = printed_by(text + effect, desk).splitlines()
            assert {line.split()[0] for line in lines if line} >= printed
            ran += 1
            continue
        for line in text.splitlines():
            command = shlex.split(line.removeprefix("$ "), comments=True)
            if command[0] == "loradeploy":
                run(command[1:])
                ran += 1
    assert ran == count
    assert (desk / made).exists()


def test_the_command_is_installed_beside_python() -> None:
    command = Path(sys.executable).with_name("loradeploy")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("loradeploy, version")


def test_the_readme_names_make_targets_and_directories_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^\$ make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    for room in re.findall(r"^\| `([\w/]+)` \|", README, re.MULTILINE):
        assert (ROOT / room).is_dir()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists()
