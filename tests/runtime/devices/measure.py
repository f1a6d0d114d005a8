"""Run bundles on WebGPU and on the CPU and write the results, one JSON object per line.

    python -m tests.runtime.devices.measure RESULTS < JOB.json

Runs in a separate process, because a crash of the plugin ends the process. JOB has `bundles` and
`adapters`, paths by name. Each case writes its result as soon as it is done.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import loradeploy as ld
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.sample import Sample
from loradeploy.runtime.capture.replays import _options
from loradeploy.runtime.devices import table
from loradeploy.runtime.devices.plugins import plugin_devices
from tests.runtime.steps import logits_of_steps

WEBGPU = "WebGpuExecutionProvider"
TOKENS = 12
PROMPTS = ["The news", "Shares fell today"]
TEXTS = ["Shares fell.", "The match was won in the last minute of extra time", "A"]

Job = Mapping[str, Mapping[str, str]]
CASES: dict[str, Callable[[Job], dict[str, Any]]] = {}


def case(work: Callable[[Job], dict[str, Any]]) -> Callable[[Job], dict[str, Any]]:
    """Register a case under the name of its function."""
    CASES[work.__name__] = work
    return work


class Pair:
    """One bundle on the CPU and on WebGPU, with the same adapters."""

    def __init__(self, job: Job, bundle: str, adapters: Sequence[str], **options: Any) -> None:
        path = job["bundles"][bundle]
        self.host = ld.AdapterSession(path)
        self.device = ld.AdapterSession(path, ["webgpu"], **options)
        for session in (self.host, self.device):
            for name in adapters:
                session.load(name, job["adapters"][name])
        self.outputs = [self.host.manifest.outputs[0].name]
        self.sample = Sample(self.host.manifest.inputs, model_config(Path(path)))

    def compare(self, adapters: Any) -> dict[str, float]:
        """Return the largest error of the device and the effect of the adapters, in the logits."""
        rows = len(adapters) if isinstance(adapters, list) else 1
        feeds = self.sample.feeds(rows, TOKENS)
        here = self.device.run(self.outputs, feeds, adapters)[0]
        there = self.host.run(self.outputs, feeds, adapters)[0]
        base = self.host.run(self.outputs, feeds)[0]
        changed = np.abs(there - base).max(axis=tuple(range(1, there.ndim)))
        return {
            "error": float(np.abs(here - there).max()),
            "effect": float(changed[changed > 0].min()) if changed.any() else 0.0,
        }

    def texts(self, adapters: Any) -> list[list[str]]:
        """Return the texts that the CPU and WebGPU generate."""
        return [
            [
                answer.text
                for answer in ld.TextGenerator(session).generate(
                    PROMPTS, adapters=adapters, max_new_tokens=8
                )
            ]
            for session in (self.host, self.device)
        ]


@case
def heads(job: Job) -> dict[str, Any]:
    """Classifier heads, one per adapter.

    Runs first: kernels reused for other shapes are wrong in later sessions.
    """
    pair = Pair(job, "bert", ["bert small", "bert large"])
    adapters = ["bert small", "bert large", "bert small"]
    scores = [
        [list(result.scores.values()) for result in ld.TextClassifier(session)(TEXTS, adapters)]
        for session in (pair.host, pair.device)
    ]
    return {
        "base": pair.compare(None),
        "small": pair.compare("bert small"),
        "mixed": pair.compare(["bert large", None, "bert small"]),
        "scores": scores,
    }


@case
def slots(job: Job) -> dict[str, Any]:
    pair = Pair(job, "slots", ["small", "large", "partial"])
    found: dict[str, Any] = {"base": pair.compare(None)}
    for name in ("small", "large", "partial", "small again"):
        found[name] = pair.compare(name.partition(" ")[0])
    found["mixed"] = pair.compare([None, "small", "large", "partial"])
    found["blend"] = pair.compare({"small": 0.7, "partial": 0.3})
    found["texts"] = pair.texts(None), pair.texts("small"), pair.texts(["partial", "large"])
    feeds = pair.sample.feeds(1, TOKENS)
    names = [spec.name for spec in pair.device.manifest.outputs]
    values = pair.device.run_with_ort_values(names, feeds, "small")
    found["memory"] = sorted({value.device_name() for value in values})
    found["device_bytes"] = pair.device.statistics.device_bytes
    found["host_device_bytes"] = ld.AdapterSession(job["bundles"]["slots"]).statistics.device_bytes
    found["providers"] = pair.device.providers
    found["placement"] = pair.device.placement
    return found


@case
def rows(job: Job) -> dict[str, Any]:
    pair = Pair(job, "rows", ["small", "partial"])
    return {
        "base": pair.compare(None),
        "partial": pair.compare("partial"),
        "mixed": pair.compare(["small", None, "partial"]),
        "texts": [pair.texts(["partial", "small"])],
    }


@case
def branches(job: Job) -> dict[str, Any]:
    pair = Pair(job, "branches", ["small", "partial"])
    return {
        "base": pair.compare(None),
        "partial": pair.compare("partial"),
        "mixed": pair.compare(["small", None, "partial"]),
        "base again": pair.compare(None),
    }


@case
def required_inputs(job: Job) -> dict[str, Any]:
    """The graph for providers that do not support inputs with defaults."""
    row = table.BY_FULL_NAME[WEBGPU]
    table.BY_FULL_NAME[WEBGPU] = dataclasses.replace(row, takes_defaults=False)
    try:
        pair = Pair(job, "branches", ["small", "partial"])
        graph = pair.device._session
        return {
            "optional": len(graph.get_overridable_initializers()),
            "base": pair.compare(None),
            "partial": pair.compare("partial"),
            "mixed": pair.compare(["small", None, "partial"]),
        }
    finally:
        table.BY_FULL_NAME[WEBGPU] = row


@case
def output_changes(job: Job) -> dict[str, Any]:
    """DoRA's output scales, in a batch with an adapter without them."""
    pair = Pair(job, "dora", ["small", "dora"])
    return {
        "base": pair.compare(None),
        "dora": pair.compare("dora"),
        "mixed": pair.compare(["small", None, "dora"]),
    }


@case
def gqa(job: Job) -> dict[str, Any]:
    """GroupQueryAttention with a cache in place, below the length at which SwiftShader is wrong."""
    pair = Pair(job, "gqa", ["small", "partial"], check_device=False)
    return {
        "base": pair.compare(None),
        "mixed": pair.compare(["small", None, "partial"]),
        "texts": [pair.texts(["partial", "small"])],
        "placement": pair.device.placement,
    }


@case
def replays(job: Job) -> dict[str, Any]:
    """Recorded runs with different adapters in each step, on a graph entirely on WebGPU."""
    host = ld.AdapterSession(job["bundles"]["in place"])
    device = ld.AdapterSession(
        job["bundles"]["recordable"], ["webgpu"], check_device=False, capture_graphs=True
    )
    for session in (host, device):
        for name in ("small", "large", "partial"):
            session.load(name, job["adapters"][name])
    steps = [None] * 3 + ["large"] * 3 + ["small", "partial", "small", "partial"]
    steps += [["small", None], ["small", "partial"], [None, "small"], "large"]
    tokens = np.random.default_rng(0).integers(3, 512, (2, len(steps)))
    here, there = (logits_of_steps(session, tokens, steps) for session in (device, host))
    base = logits_of_steps(host, tokens, [None] * len(steps))
    again = logits_of_steps(device, tokens, steps)
    # A replay reads the recorded buffers, whatever is bound later: onnxruntime's Python API cannot
    # express that, so the recording is replayed directly.
    assert device._replays is not None
    recording = next(iter(device._replays._recordings.values()))
    numbers = []
    for token in (5, 7):
        other = onnxruntime.OrtValue.ortvalue_from_numpy(np.full((2, 1), token), "webgpu", 0)
        binding = recording.binding._iobinding
        binding.bind_ortvalue_input("input_ids", other._ortvalue)
        device._session._sess.run_with_iobinding(binding, _options(recording.number))
        numbers.append(recording.outputs["logits"].numpy().copy())
    effects = np.abs(there - base).max(axis=(1, 2))
    return {
        "error": float(np.abs(here - there).max()),
        "again": float(np.abs(again - here).max()),
        "effect": float(effects[3:].min()),
        "captured": device.captured,
        "placement": sorted(device.placement),
        "after other feeds": float(np.abs(numbers[1] - numbers[0]).max()),
        "device_bytes": device.statistics.device_bytes,
    }


@case
def not_recordable(job: Job) -> dict[str, Any]:
    try:
        ld.AdapterSession(
            job["bundles"]["in place"], ["webgpu"], check_device=False, capture_graphs=True
        )
    except ld.LoraDeployError as problem:
        return {"kind": type(problem).__name__, "message": str(problem)}
    return {}


@case
def wrong_kernel(job: Job) -> dict[str, Any]:
    try:
        ld.AdapterSession(job["bundles"]["gqa"], ["webgpu"])
    except ld.LoraDeployError as problem:
        return {"kind": type(problem).__name__, "message": str(problem)}
    return {}


@case
def session_options(job: Job) -> dict[str, Any]:
    """Providers chosen by name or in session options, also several times."""
    bundle = job["bundles"]["slots"]
    options = onnxruntime.SessionOptions()
    opened = []
    for _ in range(2):
        session = ld.AdapterSession(bundle, ["webgpu"], session_options=options, check_device=False)
        opened.append(session.providers)
    own = onnxruntime.SessionOptions()
    own.add_provider_for_devices(plugin_devices()[WEBGPU][:1], {})
    pair = Pair(job, "slots", ["partial"])
    pair.device = ld.AdapterSession(bundle, session_options=own, check_device=False)
    pair.device.load("partial", job["adapters"]["partial"])
    given = [("webgpu", {"powerPreference": "low-power"}), "cpu"]
    found = {
        "opened": opened,
        "own options": pair.device.providers,
        "own options, partial": pair.compare("partial"),
        "with options": ld.AdapterSession(
            bundle, given, check_device=False
        )._session.get_provider_options(),
    }
    for name, providers, reused in (("other", ["cpu"], options), ("both", ["webgpu"], own)):
        try:
            ld.AdapterSession(bundle, providers, session_options=reused, check_device=False)
        except ld.LoraDeployError as problem:
            found[name] = str(problem)
    return found


def main() -> None:
    """Run every case, or those named by the arguments; an exception of a case is its result."""
    job = json.load(sys.stdin)
    results, *names = sys.argv[1:]
    with open(results, "a", encoding="utf-8") as out:
        for name in names or CASES:
            found = CASES[name](job)
            out.write(json.dumps({name: found}) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
