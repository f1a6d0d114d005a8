"""The whole way on a GPU machine, in one command: train → export → run → parity → timing.

    python -m tools.gpu_check [--output build/gpu] [--precision fp16]

Writes gpu.json with the figures of the CPU and the CUDA provider side by side, and exits with 1
where they do not agree or CUDAExecutionProvider does not run the graph.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import loradeploy as ld
from loradeploy.errors import LoraDeployError
from loradeploy.files import write_json
from loradeploy.runtime.environment import examine
from loradeploy.runtime.timing import time_bundle
from tools.news_tasks import stories, write_tasks
from tools.real_models import bbc_news, smollm2

PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
}
TASKS = ("headline", "topic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/gpu"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    arguments = parser.parse_args()
    output: Path = arguments.output
    report: dict[str, Any] = {"machine": machine(), "precision": arguments.precision}

    model = smollm2()
    told = stories(bbc_news())
    data = write_tasks(told[2:802], output)
    adapters = {task: output / "adapters" / task for task in TASKS}
    report["training"] = {
        task: asdict(ld.train(model, data[task], adapters[task], max_steps=arguments.steps))
        for task in TASKS
    }
    begin = time.perf_counter()
    ld.export(model, output / "bundle", adapters=adapters, precision=arguments.precision)
    report["export_s"] = time.perf_counter() - begin

    prompts = [story.prompt for story in told[:2] for _ in range(3)]
    rows = [None, *TASKS] * 2
    report["providers"] = {
        name: on_provider(output / "bundle", providers, model, prompts, rows)
        for name, providers in PROVIDERS.items()
    }
    report["passed"] = passed(report)
    write_json(output / "gpu.json", plain(report))
    print(f"{'passed' if report['passed'] else 'FAILED'}; figures in {output / 'gpu.json'}")
    raise SystemExit(0 if report["passed"] else 1)


def machine() -> dict[str, Any]:
    """The device as its driver names it, and what is installed."""
    try:
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ]
        device = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        device = "none"
    return {
        "device": device,
        "platform": platform.platform(),
        "findings": [asdict(finding) for finding in examine()],
    }


def on_provider(
    bundle: Path,
    providers: Sequence[str],
    model: Path,
    prompts: Sequence[str],
    rows: Sequence[str | None],
) -> dict[str, Any]:
    """Texts, times and parity on one provider; the error in words where it does not start."""
    try:
        session = ld.AdapterSession(bundle, providers)
    except LoraDeployError as problem:
        return {"error": str(problem)}
    begin = time.perf_counter()
    answers = ld.TextGenerator(session).generate(prompts, rows, max_new_tokens=32)
    generated = time.perf_counter() - begin
    return {
        "running": session.providers,
        "texts": [answer.text for answer in answers],
        "generate_s": generated,
        "timing": {
            f"batch {batch}": [asdict(t) for t in time_bundle(session, batch=batch)]
            for batch in (1, 8, 64)
        },
        "parity": ld.parity(bundle, model=model, providers=providers[:1]).to_json(),
    }


def passed(report: dict[str, Any]) -> bool:
    """Whether CUDA ran the graph, and parity holds on both providers."""
    on_cuda = report["providers"]["cuda"]
    return "CUDAExecutionProvider" in on_cuda.get("running", ()) and all(
        found.get("parity", {}).get("passed") for found in report["providers"].values()
    )


def plain(value: Any) -> Any:
    """`value` as JSON holds it."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
