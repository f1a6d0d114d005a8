"""Measure the cost of parity's comparisons: SmolLM2-135M, one adapter of rank 16, AdapterSession.

    python -m tools.bench_parity [--rounds 5] [--output build/bench]

*Running* runs PyTorch and ONNX Runtime on the same inputs, with the base and the adapter, and
discards the outputs. *Comparing* does what `loradeploy parity` does: it also measures the limits,
and compares every output value. Both are in one process, in random order; running is timed twice,
as the control.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.console import Console

import loradeploy as ld
from loradeploy.bundle.manifest import read_manifest
from loradeploy.files import write_json
from loradeploy.parity.backends.table import choose_backends, open_backend
from loradeploy.parity.checks.check import run_backends
from loradeploy.parity.checks.runs import Progress
from loradeploy.parity.context import CheckContext, find_adapters
from loradeploy.parity.inputs.prompts import PROMPTS
from loradeploy.parity.inputs.tokens import make_cases
from loradeploy.parity.phases.choice import phases_of
from loradeploy.parity.phases.run import run_phases
from loradeploy.parity.reference.loading import load_base
from loradeploy.parity.reference.pytorch import as_reference, make_reference, reference_rows
from tools.bench_runtime import random_adapters
from tools.inputs.real_models import cache, smollm2
from tools.timing.alternate import ratio

_PROMPTS: Final = 6
_TOKENS: Final = 16

console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sides = make_sides(Path(scratch))
        seconds = {name: [0.0] * arguments.rounds for name in sides}
        for number in range(arguments.rounds):
            for name in random.sample(sorted(sides), len(sides)):
                begin = time.perf_counter()
                sides[name]()
                seconds[name][number] = time.perf_counter() - begin
                console.print(f"round {number + 1}, {name}: {seconds[name][number]:.1f} s")
    report = {
        "prompts": _PROMPTS,
        "tokens": _TOKENS,
        "seconds": seconds,
        "comparing / running": asdict(ratio(seconds["comparing"], seconds["running"])),
        "control": asdict(ratio(seconds["control"], seconds["running"])),
    }
    write_json(arguments.output / "parity.json", report)
    print(f"comparing / running: {ratio(seconds['comparing'], seconds['running'])}")
    print(f"control: {ratio(seconds['control'], seconds['running'])}")


def make_sides(scratch: Path) -> dict[str, Callable[[], object]]:
    """Return the functions that run, or compare, the base and one adapter."""
    model, place = smollm2(), cache() / "bench" / "parity"
    adapter, bundle = place / "adapter", place / "bundle"
    if not adapter.exists():
        random_adapters(model, [adapter])
    ld.export(model, bundle, adapters={"a0": adapter})
    manifest = read_manifest(bundle)
    cases = make_cases(bundle, manifest, prompts=PROMPTS[:_PROMPTS], generated=_TOKENS, seed=0)
    context = CheckContext(
        bundle=bundle,
        manifest=manifest,
        model=model,
        adapters=find_adapters(bundle, manifest, None),
        cases=cases,
        scratch=scratch,
    )
    backends = choose_backends(manifest.mode, ["onnx-side-inputs"])
    base = load_base(context)

    def running() -> None:
        rows = {}
        for name in (None, "a0"):
            with as_reference(context, base, name):
                rows[name] = reference_rows(context, base.model, name, _TOKENS)
        for name, opened in open_backend(backends[0], context, None):
            for _ in run_phases(opened, rows[name], phases_of(manifest.task), context.feeding()):
                pass

    def comparing() -> None:
        reference = make_reference(context, base)
        progress = Progress(backends, context)
        results = run_backends(backends, context, reference, None, progress)
        assert all(result.outcome == "passed" for result in results), results

    return {"running": running, "control": running, "comparing": comparing}


if __name__ == "__main__":
    main()
