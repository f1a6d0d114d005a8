"""Check everything on a GPU machine: train → export → placement → parity → timing.

    python -m tools.gpu_check [--output build/gpu] [--form cuda]…
    python -m tools.gpu_check --stubs      # without a GPU: everything except numbers and times
    python -m tools.gpu_check --scale tiny --model DIRECTORY      # a quick run, in seconds

Writes gpu.json with the placement of every form's nodes, and the figures of the CPU and the CUDA
provider, for CUDA also with captured runs. The exit status is 1 if CUDA does not run or capture a
graph, if nodes are on the CPU that should not be, or if parity fails. With --stubs, the CUDA
provider is loaded with libraries that compute nothing (tools.cuda_placement): the reported parity
and times of CUDA are meaningless.
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
    """The amount of work.

    `stories`, `words`: number of training stories, and words of each. `steps`: training steps.
    `new_tokens`: generated tokens. `rounds`, `batches`, `length`: rounds of timing, batch sizes,
    and tokens in the cache. `parity`: arguments of `loradeploy.parity`.
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
        steps=20,
        new_tokens=4,
        rounds=1,
        batches=(1, 2),
        length=16,
        parity={"prompts": ["The capital of"], "tokens": 2, "backends": ["onnx-side-inputs"]},
    ),
}
CUDA: Final = BY_NAME["cuda"].full
# The export options of each form. int4 is exported from the fp32 bundle if there is one.
FORMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "cuda": {"target": "cuda"},
    "fp32": {"target": "cuda", "precision": "fp32"},
    "int4": {"target": "cuda", "precision": "int4"},
}
# Nodes that may be on the CPU: they compute the number of positions for GroupQueryAttention, and
# process `logits_to_keep` as a shape.
ALLOWED: Final = {"Squeeze": 1, "Cast": 1, "Concat": 1, "Mul": 1}
# A plain run, a recorded run, and replays.
TURNS: Final = 4
# The largest error of a replay, relative to the adapters' effect. The kernels are the same, but a
# captured run may use another algorithm for a product, which rounds differently.
REPLAYED: Final = 0.01
# Parity compares float32; TF32 would round the operands of products to 10 bits.
EXACT: Final = {"use_tf32": "0"}
PROVIDERS: Final[Mapping[str, Provider]] = {"cpu": CPU, "cuda": (CUDA, EXACT)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/gpu"))
    parser.add_argument("--model", type=Path, help="a decoder's directory [default: SmolLM2-135M]")
    parser.add_argument("--form", action="append", choices=FORMS, help="[default: all]")
    parser.add_argument("--scale", choices=SCALES, default="full", help="amount of work")
    parser.add_argument(
        "--stubs", action="store_true", help="run without a GPU; numbers and times are meaningless"
    )
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
            "  on stub libraries: nothing was computed on CUDA, numbers and times are meaningless"
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
    """Run the check, write gpu.json, and return the report. `device`: use a GPU, not stubs."""
    news = [
        replace(story, text=" ".join(story.text.split()[: scale.words]))
        for story in stories(bbc_news())[: scale.stories + 2]
    ]
    output.mkdir(parents=True, exist_ok=True)
    data = write_tasks(news[2:], output)
    adapters = {task: output / "adapters" / task for task in TASKS}
    training = {
        task: ld.train(model, data[task], adapters[task], max_steps=scale.steps) for task in TASKS
    }
    prompts = [story.prompt for story in news[:2] for _ in range(3)]
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
    """Return the problems of a placement: nodes on the CPU, or a refused CUDA graph."""
    over = placement.on_cpu - Counter(ALLOWED)
    found = [f"{count} {op} on the CPU" for op, count in over.items()]
    if placement.refusal is not None:
        found.append(f"no CUDA graph: {placement.refusal}")
    return found


def wrong(found: Mapping[str, Any]) -> list[str]:
    """Return the problems in the figures of one provider."""
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
    """Measure texts, times and parity on one provider; the error message if it does not start."""
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
    """Compare captured runs on CUDA with runs that are not captured, and time them.

    `replays`: by side, the differences of the logits. `texts`: only if the cache is updated in
    place.
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
    """Compare logits of replayed decode steps: the base, each adapter and a mixed batch.

    `error`: the largest difference from the `usual` session. `effect`: the largest change by the
    adapters in that session. The sides take turns, so that a replay that reads the inputs of
    another side shows.
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
    """Return the problems of captured runs; on a `device`, also differences in their numbers."""
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
    """Generate with the base and each adapter in one batch; return the texts and the seconds."""
    rows = [None, *TASKS] * (len(prompts) // 3)
    begin = time.perf_counter()
    answers = ld.TextGenerator(session).generate(prompts, rows, max_new_tokens=scale.new_tokens)
    return {
        "texts": [answer.text for answer in answers],
        "generate_s": time.perf_counter() - begin,
    }


def decoded(session: ld.AdapterSession, scale: Scale) -> dict[str, Any]:
    """Time a decode step: the base, each adapter, a swap at each call, a mixed batch."""
    return {
        f"batch {batch}": time_bundle(
            session, batch=batch, length=scale.length, rounds=scale.rounds
        )
        for batch in scale.batches
    }


def prefill(session: ld.AdapterSession, batch: int, scale: Scale) -> dict[str, float]:
    """Return the median milliseconds of a prefill, for the base and each adapter in turn."""
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
    """Return the device's name from its driver, and the findings of `loradeploy doctor`."""
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
    """Run the same command in a process that loads the stub libraries; return its exit status."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs())}
    command = [sys.executable, "-m", "tools.gpu_check", *sys.argv[1:]]
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    main()
