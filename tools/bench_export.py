"""Measure exports and merges: seconds, processor time and peak memory of the command.

    python -m tools.bench_export [--layers 2] [--rounds 3] [--output build/bench]

SmolLM2-135M, and a random Llama with `--layers` layers of Llama-2-7B's size in fp32 (`--layers 0`:
without it), are exported with side inputs; then an adapter of rank 16 on all linear layers is
merged into the bundle. Each is a separate process, `python -m loradeploy export`; the order of the
models is random.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from loradeploy.files import write_json
from tools.inputs.made_adapters import make_adapters
from tools.inputs.real_models import cache, smollm2

_RANK: Final = 16
_MIB: Final = 1 << 20
_KIB: Final = 1 << 10  # Linux' unit of peak memory

console = Console(stderr=True)


@dataclass(frozen=True)
class Cost:
    """The cost of a process: `wall` and `processor` in seconds, `peak` resident memory in bytes."""

    wall: float
    processor: float
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2, help="layers of the random Llama; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make is not None:
        _make(arguments.make, arguments.layers)
        return
    models = {"SmolLM2-135M": smollm2()}
    if arguments.layers:
        models[f"Llama of {arguments.layers} layers"] = _large(arguments.layers)
    costs: dict[str, list[Cost]] = {}
    sizes = {name: _size(model) for name, model in models.items()}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.rounds):
            for name in random.sample(sorted(models), len(models)):
                for what, cost in _measured(models[name], Path(scratch)).items():
                    costs.setdefault(f"{what} of {name}", []).append(cost)
                    console.print(f"round {number + 1}, {what} of {name}: {cost.wall:.1f} s")
    report = {
        "bytes": sizes,
        "costs": {what: [asdict(cost) for cost in found] for what, found in costs.items()},
    }
    write_json(arguments.output / "export.json", report)
    print("| what | wall | processor | peak memory | peak / model |")
    print("|---|---|---|---|---|")
    for what, found in costs.items():
        size = next(size for name, size in sizes.items() if what.endswith(f" of {name}"))
        peak = max(cost.peak for cost in found)
        seconds = (statistics.median(c.wall for c in found), min(c.processor for c in found))
        print(
            f"| {what} | {seconds[0]:.1f} s | {seconds[1]:.1f} s | {peak / _MIB:.0f} MiB"
            f" | {peak / size:.2f} |"
        )


def _measured(model: Path, scratch: Path) -> dict[str, Cost]:
    """Export `model`, merge an adapter into its bundle, and remove both; return the costs."""
    bundle, merged, place = scratch / "bundle", scratch / "merged", scratch / "made"
    try:
        export = _run("export", "--model", str(model), "--output", str(bundle))
        (adapter,) = make_adapters(bundle, place, 1, rank=_RANK).values()
        given = ("--model", str(bundle), "--adapter", adapter, "--merge", "--output", str(merged))
        return {"export": export, "merge": _run("export", *given)}
    finally:
        for directory in (bundle, merged, place):
            shutil.rmtree(directory, ignore_errors=True)


def _run(*arguments: str) -> Cost:
    """Run the command in a process, and return its cost.

    Raises:
        RuntimeError: the command failed; its error is on stderr.
    """
    begin = time.perf_counter()
    command = [sys.executable, "-m", "loradeploy", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: its error is above")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _KIB)


def _size(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _large(layers: int) -> Path:
    """Return the random Llama, made once. It is made in another process, since a child process
    inherits its parent's peak memory.
    """
    place = cache() / f"llama-7b-width-{layers}"
    if not place.exists():
        command = [sys.executable, "-m", "tools.bench_export", "--layers", str(layers)]
        subprocess.run([*command, "--make", str(place)], check=True)
    return place


def _make(place: Path, layers: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from loradeploy.files import atomic_directory

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=layers))
    with atomic_directory(place, marker="config.json") as temporary:
        model.save_pretrained(temporary)


if __name__ == "__main__":
    main()
