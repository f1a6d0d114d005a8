"""Helpers that call the command line, in this process or in a separate one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner

from loradeploy.cli.main import commands, main

# (*arguments) → exit status, stdout, stderr
Run = Callable[..., tuple[int, str, str]]

# Simulates a machine without the extras.
WITHOUT_EXTRAS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in (
            *("torch", "transformers", "accelerate", "matplotlib", "onnx", "onnx_ir"),
            *("fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn"),
        ):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from loradeploy.cli.main import main
main(sys.argv[1:])
"""


def without_extras(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def call(*arguments: object) -> str:
    done = CliRunner().invoke(commands, [str(a) for a in arguments], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def exit_status(*arguments: object) -> int:
    """Call the command line and return its exit status; errors are printed as usual."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    status = ended.value.code
    assert isinstance(status, int)
    return status


def command(verb: str) -> click.Command:
    found = commands.get_command(click.Context(commands), verb)
    assert found is not None
    return found


def one_line(text: str) -> str:
    (line,) = text.splitlines()
    assert line.startswith("Error: ")
    assert "Traceback" not in line
    return line
