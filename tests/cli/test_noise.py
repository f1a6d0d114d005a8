"""Log lines, progress bars and colors of libraries are not shown to the user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import MakeAdapter

# A library that logs and warns at import and at every call.
NOISY = """
import logging, sys, warnings
import click
import loradeploy.cli.main as main

@click.command()
def command():
    remarks = logging.getLogger("bitsandbytes.backends.cpu.ops")
    remarks.warning("Failed to load CPU gemm_4bit_forward")
    logging.getLogger("somebody.else").error("a remark")
    warnings.warn("deprecated", FutureWarning)
    logging.getLogger("loradeploy.runtime.reading.graph").warning("what matters")

main.commands.get_command = lambda ctx, name: command
main.main(sys.argv[1:])
"""


def called(*arguments: object, code: str | None = None) -> tuple[int, str]:
    """Run the command in a separate process, like a user; return exit status and stderr."""
    program = ["-m", "loradeploy"] if code is None else ["-c", code]
    hidden = ("TRANSFORMERS_VERBOSITY", "PYTHONWARNINGS", "TOKENIZERS_PARALLELISM")
    done = subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env={name: value for name, value in os.environ.items() if name not in hidden},
    )
    return done.returncode, done.stderr


def test_logs_and_warnings_of_libraries_are_not_shown() -> None:
    assert called("noise", code=NOISY) == (0, "what matters\n")


def test_debug_shows_everything() -> None:
    _, err = called("--debug", "noise", code=NOISY)
    for message in ("gemm_4bit_forward", "a remark", "deprecated", "what matters"):
        assert message in err


def test_a_successful_parity_check_writes_nothing_to_stderr(
    certified_bundle: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    # A copy: parity writes a certificate of this smaller check to the bundle.
    bundle = shutil.copytree(certified_bundle, tmp_path / "bundle")
    options = ("--tokens", 1, "--backends", "peft,onnx-side-inputs", "--phases", "prefill")
    assert called("parity", bundle, "--model", tiny_llama, *options) == (0, "")


def test_a_successful_export_writes_nothing_to_stderr(tiny_llama: Path, tmp_path: Path) -> None:
    assert called("export", "--model", tiny_llama, "--output", tmp_path / "b") == (0, "")


@pytest.mark.parametrize("verb", ["run", "bench", "parity"])
def test_a_broken_graph_is_a_one_line_error(
    verb: str, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_llama_bundle, tmp_path / "bundle"))
    (bundle / "model.onnx").write_bytes(b"\x08\x08nonsense")
    graph = bundle / "model.onnx"
    more = {"run": (bundle, "hi"), "bench": (bundle,), "parity": (graph, "--against", graph)}[verb]
    status, err = called(verb, *more)
    (line,) = err.splitlines()
    assert (status, line.startswith("Error: ")) == (2, True)
    assert "\x1b" not in line


def test_a_provider_that_does_not_start_is_a_one_line_error(tiny_llama_bundle: Path) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a device here")
    status, err = called("run", tiny_llama_bundle, "hi", "--provider", "cuda")
    (line,) = err.splitlines()
    assert (status, line.startswith("Error: ")) == (2, True)


@pytest.mark.parametrize(
    ("model", "called_base"),
    [("tiny_llama", "this base model"), ("tiny_llama_bundle", "this bundle")],
)
def test_an_adapter_of_another_model_is_a_one_line_error(
    model: str,
    called_base: str,
    tiny_gpt2: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    make_adapter: MakeAdapter,
) -> None:
    arguments = ("--model", request.getfixturevalue(model), "--output", tmp_path / "b")
    status, err = called("export", *arguments, "--adapter", make_adapter(tiny_gpt2))
    (line,) = err.splitlines()
    assert status == 2
    assert f"does not fit {called_base}: " in line
