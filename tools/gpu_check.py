"""The whole way on a GPU machine, in one command: train → export → placement → parity → timing.

    python -m tools.gpu_check [--output build/gpu] [--form cuda]…
    python -m tools.gpu_check --stubs      # without a GPU: everything but numbers and times
    python -m tools.gpu_check --scale tiny --model DIRECTORY      # the way alone, in seconds

Writes gpu.json with the placement of every form's nodes, and the figures of the CPU and the CUDA
provider side by side, on CUDA with its runs captured too. Exits with 1 where CUDA does not run or
capture a graph, where nodes are on the CPU that should not be, or where parity does not hold. With
--stubs the CUDA provider opens on libraries that compute nothing (tools.cuda_placement): parity and
times of CUDA are written and mean nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import loradeploy as ld
from loradeploy.errors import LoraDeployError
from loradeploy.files import json_values, write_json
from loradeploy.runtime.devices.environment import examine
from loradeploy.runtime.devices.providers import Provider
from loradeploy.runtime.devices.table import BY_NAME, CPU
from loradeploy.runtime.timing import forward, time_bundle
from tools.cuda_placement import Placement, place, stubs
from tools.inputs.news_tasks import stories, write_tasks
from tools.inputs.real_models import bbc_news, smollm2

TASKS: Final = ("headline", "topic")


@dataclass(frozen=True)
class Scale:
    """How much is done: stories that are trained on, and words of each; steps of training; new
    tokens; rounds of timing, of these batches, after so many tokens; prompts and tokens of parity,
    None for those that it has itself.
    """

    stories: int = 800
    words: int = 60
    steps: int = 40
    new_tokens: int = 32
    rounds: int = 15
    batches: tuple[int, ...] = (1, 8, 64)
    length: int = 128
    parity: Mapping[str, Any] = field(default_factory=dict)


SCALES: Final = {
    "full": Scale(),
    "tiny": Scale(
        stories=8,
        words=6,
        steps=1,
        new_tokens=4,
        rounds=1,
        batches=(1, 2),
        length=16,
        parity={"prompts": ["The capital of"], "tokens": 2, "backends": ["onnx-side-inputs"]},
    ),
}
CUDA: Final = BY_NAME["cuda"].full
# What each form is exported with. The first of a precision is traced, int4 is made of fp32.
FORMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "cuda": {"target": "cuda"},
    "fp32": {"target": "cuda", "precision": "fp32"},
    "int4": {"target": "cuda", "precision": "int4"},
}
# Nodes that may be on the CPU: GroupQueryAttention takes the number of positions from there, and
# `logits_to_keep` is read by sizes.
ALLOWED: Final = {"Squeeze": 1, "Cast": 1, "Concat": 1, "Mul": 1}
# A run by itself, one that is recorded, replays.
TURNS: Final = 4
# The largest error of a replay, in parts of what the adapters change: the kernels are the same, and
# a captured run may be given another algorithm of a product, which rounds in another order.
REPLAYED: Final = 0.01
# Parity compares float32: TF32 rounds its factors to 10 bits.
EXACT: Final = {"use_tf32": "0"}
PROVIDERS: Final[Mapping[str, Provider]] = {"cpu": CPU, "cuda": (CUDA, EXACT)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/gpu"))
    parser.add_argument("--model", type=Path, help="a decoder's directory [default: SmolLM2-135M]")
    parser.add_argument("--form", action="append", choices=FORMS, help="[default: all]")
    parser.add_argument("--scale", choices=SCALES, default="full", help="how much is done")
    parser.add_argument("--stubs", action="store_true", help="without a GPU: numbers apart")
    arguments = parser.parse_args()
    if arguments.stubs and not _on_stubs():
        raise SystemExit(_again_on_stubs())
    report = check(
        arguments.model or smollm2(),
        arguments.output,
        forms=arguments.form or list(FORMS),
        scale=SCALES[arguments.scale],
        device=not arguments.stubs,
    )
    verdict = "passed" if report["passed"] else "FAILED"
    print(f"{verdict}; figures in {arguments.output / 'gpu.json'}")
    for failure in report["failures"]:
        print(f"  {failure}")
    if arguments.stubs:
        print(
            "  on stub libraries: nothing was computed on CUDA, its numbers and times mean nothing"
        )
    raise SystemExit(0 if report["passed"] else 1)


def check(
    model: Path,
    output: Path,
    *,
    forms: Sequence[str],
    scale: Scale,
    device: bool,
) -> dict[str, Any]:
    """The report, which is written to gpu.json too; `device`: a GPU is there, and no stubs."""
    told = [
        replace(story, text=" ".join(story.text.split()[: scale.words]))
        for story in stories(bbc_news())[: scale.stories + 2]
    ]
    output.mkdir(parents=True, exist_ok=True)
    data = write_tasks(told[2:], output)
    adapters = {task: output / "adapters" / task for task in TASKS}
    training = {
        task: ld.train(model, data[task], adapters[task], max_steps=scale.steps) for task in TASKS
    }
    prompts = [story.prompt for story in told[:2] for _ in range(3)]
    report: dict[str, Any] = {
        "machine": machine(device),
        "stubs": not device,
        "training": training,
        "forms": {},
    }
    failures: list[str] = []
    for form in forms:
        bundle = output / form
        begin = time.perf_counter()
        fp32 = output / "fp32"
        source = fp32 if FORMS[form].get("precision") == "int4" and fp32.exists() else model
        ld.export(source, bundle, adapters=adapters, **FORMS[form])
        found: dict[str, Any] = {"export_s": time.perf_counter() - begin}
        (placement,) = place([bundle / "model.onnx"], device=device)
        found["placement"] = placement.to_json()
        failures += [f"{form}: {why}" for why in misplaced(placement)]
        for name, provider in PROVIDERS.items():
            found[name] = measured(bundle, provider, model, prompts, scale)
            if name == "cpu" or device:
                failures += [f"{form} on {name}: {why}" for why in wrong(found[name])]
            elif "error" in found[name]:
                failures.append(f"{form} on {name}: {found[name]['error']}")
        found["cuda_captured"] = captured(bundle, prompts, scale)
        failures += [
            f"{form} captured: {why}"
            for why in wrong_captured(found["cuda_captured"], found["cuda"], device)
        ]
        report["forms"][form] = found
    report |= {"failures": failures, "passed": not failures}
    write_json(output / "gpu.json", json_values(report))
    return report


def misplaced(placement: Placement) -> list[str]:
    """What is wrong with the placement: nodes on the CPU, or a CUDA graph that is refused."""
    over = placement.on_cpu - Counter(ALLOWED)
    found = [f"{count} {op} on the CPU" for op, count in over.items()]
    if placement.refusal is not None:
        found.append(f"no CUDA graph: {placement.refusal}")
    return found


def wrong(found: Mapping[str, Any]) -> list[str]:
    """What is wrong with the figures of one provider."""
    if "error" in found:
        return [str(found["error"])]
    failures = found["parity"].get("failures") or ["parity does not hold"]
    return [] if found["parity"]["passed"] else [str(failure) for failure in failures[:3]]


def measured(
    bundle: Path,
    provider: Provider,
    model: Path,
    prompts: Sequence[str],
    scale: Scale,
) -> dict[str, Any]:
    """Texts, times and parity on one provider; the error in words where it does not start."""
    fast = provider if isinstance(provider, str) else provider[0]
    try:
        session = ld.AdapterSession(bundle, [fast])
        return {
            "running": session.providers,
            "options": session.provider.options,
            **generated(session, prompts, scale),
            "decode_and_swap": decoded(session, scale),
            "prefill_ms": {
                f"batch {batch}": prefill(session, batch, scale) for batch in scale.batches[:2]
            },
            "parity": ld.parity(
                bundle, model=model, providers=[provider], certificate=False, **scale.parity
            ).to_json(),
        }
    except LoraDeployError as problem:
        return {"error": str(problem)}


def captured(bundle: Path, prompts: Sequence[str], scale: Scale) -> dict[str, Any]:
    """What captured runs compute on CUDA, beside the same session without, and their times.

    `replays`: by side, how far the logits of replayed runs are from those without; texts where the
    cache stays in place.
    """
    try:
        with (
            ld.AdapterSession(bundle, [CUDA]) as usual,
            ld.AdapterSession(bundle, [CUDA], capture_graphs=True) as session,
        ):
            found = {"replays": replayed(session, usual, scale), "graphs": session.captured}
            if session.manifest.cache_in_place:
                found |= generated(session, prompts, scale)
            return {**found, "decode_and_swap": decoded(session, scale)}
    except LoraDeployError as problem:
        return {"error": str(problem)}


def replayed(
    session: ld.AdapterSession, usual: ld.AdapterSession, scale: Scale
) -> dict[str, dict[str, float]]:
    """The logits of one more token, replayed: the base, each adapter and a mixed batch.

    `error`: the largest difference from the `usual` session's, `effect`: what the adapters of the
    side change there. The sides take turns, so that a replay which reads what another side has left
    is seen.
    """
    rows = 1 + len(TASKS)
    sides: dict[str, Any] = {
        "base": None,
        **{task: task for task in TASKS},
        "mixed": [None, *TASKS],
    }
    calls = [forward(own, rows, past=scale.length, new=1) for own in (session, usual)]
    found: dict[str, dict[str, float]] = {name: {} for name in sides}
    for _ in range(TURNS):
        there: dict[str, Any] = {}
        for name, adapters in sides.items():
            here, there[name] = (_logits(call(adapters)) for call in calls)
            errors = float(np.abs(here - there[name]).max())
            found[name]["error"] = max(errors, found[name].get("error", 0.0))
        for name in sides:
            found[name]["effect"] = float(np.abs(there[name] - there["base"]).max())
    return found


def _logits(outputs: Any) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = outputs[0].numpy()
    return values.astype(np.float64)


def wrong_captured(found: Mapping[str, Any], usual: Mapping[str, Any], device: bool) -> list[str]:
    """What is wrong with runs that were captured: on a `device`, other numbers than without."""
    if "error" in found:
        return [str(found["error"])]
    failures = [] if found["graphs"] else ["no run was captured"]
    if not device:
        return failures
    effect = max(own["effect"] for own in found["replays"].values())
    if not effect:
        failures.append("the adapters change nothing")
    for name, own in found["replays"].items():
        if not own["error"] <= REPLAYED * effect:
            failures.append(
                f"{name}: the logits of replayed runs are off by {own['error']:.2g}, the adapters"
                f" change {effect:.2g}"
            )
    if "texts" in found and found["texts"] != usual.get("texts"):
        failures.append("other texts than without")
    return failures


def generated(session: ld.AdapterSession, prompts: Sequence[str], scale: Scale) -> dict[str, Any]:
    """Texts of the base and of each adapter, in one batch, and the seconds that they took."""
    rows = [None, *TASKS] * (len(prompts) // 3)
    begin = time.perf_counter()
    answers = ld.TextGenerator(session).generate(prompts, rows, max_new_tokens=scale.new_tokens)
    return {
        "texts": [answer.text for answer in answers],
        "generate_s": time.perf_counter() - begin,
    }


def decoded(session: ld.AdapterSession, scale: Scale) -> dict[str, Any]:
    """Times of one more token: the base, each adapter, a swap at each call, a mixed batch."""
    return {
        f"batch {batch}": time_bundle(
            session, batch=batch, length=scale.length, rounds=scale.rounds
        )
        for batch in scale.batches
    }


def prefill(session: ld.AdapterSession, batch: int, scale: Scale) -> dict[str, float]:
    """Median milliseconds of a prompt, of the base and of each adapter, taking turns."""
    call = forward(session, batch, past=0, new=scale.length)
    sides = {name or "base": partial(call, name) for name in (None, *session.adapters)}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(scale.rounds + 1):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            if turn:  # the first one warms up
                taken[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def machine(device: bool) -> dict[str, Any]:
    """The device as its driver names it, and what is installed."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        named = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        named = "none"
    return {
        "device": named if device else "stub libraries",
        "platform": platform.platform(),
        "findings": examine(),
    }


def _on_stubs() -> bool:
    return os.environ.get("LD_LIBRARY_PATH") == str(stubs())


def _again_on_stubs() -> int:
    """The same command in a process that finds the stub libraries; its exit code."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs())}
    command = [sys.executable, "-m", "tools.gpu_check", *sys.argv[1:]]
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    main()
