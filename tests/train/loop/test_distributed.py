"""Several processes give the same training as one on the same batches, with the same command."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.adapter import load_adapter
from tests.cli.calling import call
from tests.tolerances import tolerance

SETTINGS = ("--max-steps", 5, "--rank", 4, "--max-length", 64, "--learning-rate", 5e-3)
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def trained(model: Path, data: Path, output: Path, *more: object, launcher: str = "") -> Any:
    """Run the command, under a launcher of two processes or alone, and return its result."""
    given = ("train", "--model", model, "--data", data, "--output", output, "--json")
    command = [str(word) for word in (*given, *SETTINGS, *more)]
    if not launcher:
        return json.loads(call(*command))
    port = {"torchrun": "--master-port", "accelerate": "--main_process_port"}[launcher]
    name, *options = LAUNCHERS[launcher]
    own = ["-m", "loradeploy", *command]
    line = [sys.executable, "-m", name, *options, f"{port}={free_port()}", *own]
    done = subprocess.run(
        line,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def losses(adapter: Path) -> list[float]:
    rows = csv.DictReader((adapter / "loss.csv").read_text().splitlines())
    return [float(row["loss"]) for row in rows]


@pytest.mark.breadth(2)
@pytest.mark.parametrize(
    ("launcher", "more"),
    [("torchrun", ("--no-packing", "--gradient-accumulation", 2)), ("accelerate", ())],
    ids=["torchrun-accumulating", "accelerate"],
)
def test_two_processes_train_the_same_as_one_on_the_same_batches(
    launcher: str, more: tuple[object, ...], tiny_llama: Path, lessons: Path, tmp_path: Path
) -> None:
    one = trained(tiny_llama, lessons, tmp_path / "one", "--batch-size", 4, *more)
    two = trained(
        tiny_llama, lessons, tmp_path / "two", "--batch-size", 2, *more, launcher=launcher
    )
    assert losses(tmp_path / "two") == pytest.approx(
        losses(tmp_path / "one"), abs=tolerance("same-torch")
    )
    for name in ("steps", "tokens", "examples", "loss_before"):
        assert two[name] == pytest.approx(one[name], rel=1e-6), name
    ours, theirs = (load_adapter(tmp_path / side) for side in ("two", "one"))
    for module, pair in theirs.factors.items():
        np.testing.assert_allclose(
            ours.factors[module].B, pair.B, atol=5 * tolerance("same-torch"), err_msg=module
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lessons.jsonl", "one", "two"]
