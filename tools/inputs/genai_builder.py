"""Runs onnxruntime-genai's model builder in a separate environment.

onnxruntime-genai depends on onnxruntime, which would overwrite onnxruntime-gpu's files. torch and
transformers are taken from the project's environment.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_ROOT = Path(__file__).parents[2]
PYTHON = _ROOT / ".venv-genai" / "bin" / "python"


def build(model: Path, place: Path, precision: str, *, adapter: Path | None = None) -> None:
    """Write the builder's graph of a decoder to `place`, with one PEFT adapter in it or without.

    Raises:
        RuntimeError: the builder failed; the message is the end of its stderr.
    """
    (own,) = (_ROOT / ".venv-genai").glob("lib/python3*/site-packages")
    (torch,) = (_ROOT / ".venv").glob("lib/python3*/site-packages")
    command: list[str | Path] = [PYTHON, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", model, "-o", place, "-p", precision, "-e", "cpu", "-c", place / "cache"]
    if adapter is not None:
        command += ["--extra_options", f"adapter_path={adapter}"]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": f"{own}:{torch}"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
