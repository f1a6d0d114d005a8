"""Run one session from many threads under constant eviction, and compare every row.

    python -m tools.stress --seconds 600
    python -m tools.stress --seconds 0 --loads 10000

Uses a tiny random Llama in every layout, with memory budgets far below the size of its adapters.
Each row of each run must equal the same row run alone in a session without a budget, and nothing
may raise. With --loads, adapters are then loaded, used and unloaded, while the memory of the
process is recorded. Prints JSON; the exit status is 1 if a row differs or an error was raised.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

import loradeploy as ld
from loradeploy.bundle.manifest import read_manifest
from loradeploy.runtime.timing import sample_feeds
from tools.inputs.tiny_llama import random_llama

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Spec = str | Mapping[str, float] | None

# The export options of each layout.
LAYOUTS: Final[dict[str, dict[str, Any]]] = {
    "slots": {"layout": "slots"},
    "rows": {"layout": "rows"},
    "branches": {"layout": "rows", "branches": True},
}
TOLERANCE: Final = 1e-4  # for fp32 logits up to 10; adapters differ by thousands of times more
ADAPTERS: Final = 12
ROWS: Final = 5  # maximum rows of a run
INPUTS: Final = 8
LENGTH: Final = 4
PATIENCE: Final = 120.0  # time limit of a run in seconds, after which it counts as hanging


@dataclass
class Counts:
    """Counts of all threads; `wrong` and `raised` describe the first wrong rows and errors."""

    runs: int = 0
    rows: int = 0
    worst: float = 0.0
    evictions: int = 0
    wrong: list[str] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)


def write_adapters(bundle: Path, place: Path) -> dict[str, Path]:
    """Write random adapters of ranks 1 to 8 that fit `bundle`, as PEFT directories."""
    from safetensors.numpy import save_file

    targets = read_manifest(bundle).targets
    kinds = sorted({target.module.rpartition(".")[2] for target in targets})
    made = {}
    for number in range(ADAPTERS):
        values = np.random.default_rng(number)
        rank = 1 + number % 8
        tensors: dict[str, NDArray[np.float32]] = {}
        for target in targets:
            name = f"base_model.model.{target.module}.lora_"
            A, B = (rank, target.in_features), (target.out_features, rank)
            tensors[f"{name}A.weight"] = values.normal(size=A, scale=0.3).astype(np.float32)
            tensors[f"{name}B.weight"] = values.normal(size=B, scale=0.3).astype(np.float32)
        directory = place / f"a{number}"
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": kinds}
        (directory / "adapter_config.json").write_text(json.dumps(config))
        made[directory.name] = directory
    return made


class Stress:
    """One session with a small memory budget, used by several threads at once."""

    def __init__(self, bundle: Path, adapters: Mapping[str, Path], tolerance: float) -> None:
        self.tolerance = tolerance
        self.counts = Counts()
        names = list(adapters)
        pairs = zip(names[::3], names[1::3], strict=False)
        blends: list[Spec] = [{one: 0.75, other: 0.5} for one, other in pairs]
        self.specs: list[Spec] = [None, *names, *blends]
        roomy = ld.AdapterSession(bundle)
        for name, path in adapters.items():
            roomy.load(name, path)
        self._inputs = np.random.default_rng(0).integers(3, 100, (INPUTS, LENGTH))
        # The logits of each input with each adapter alone: [specs, inputs, tokens, vocabulary].
        everything = range(INPUTS)
        self.expected = [self._run(roomy, everything, spec) for spec in self.specs]
        size = roomy.statistics.host_bytes // len(roomy.adapters)
        self.session = ld.AdapterSession(bundle, host_budget=3 * size, device_budget=8 * size)
        for name, path in adapters.items():
            self.session.register(name, path)
        self._adapters = adapters
        self._lock = threading.Lock()

    def apart(self) -> float:
        """Return the smallest difference of two adapters' rows: the error of a wrong row."""
        return min(
            float(np.abs(one - other).max(axis=(1, 2)).min())
            for place, one in enumerate(self.expected)
            for other in self.expected[:place]
        )

    def run(self, seconds: float, threads: int = 8, seed: int = 0) -> Counts:
        """Run `threads` threads for `seconds`, and return the counts."""
        end = time.monotonic() + seconds
        workers = [
            threading.Thread(target=self._work, args=(end, seed + number), daemon=True)
            for number in range(threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(seconds + PATIENCE)
            if worker.is_alive():
                self._note(raised="a thread hangs")
                return self.counts
        self.counts.evictions = self.session.statistics.evictions
        return self.counts

    def _work(self, end: float, seed: int) -> None:
        choose = random.Random(seed)
        while time.monotonic() < end and not self.counts.raised:
            try:
                self._step(choose)
            except BaseException as problem:
                self._note(raised=f"{type(problem).__name__}: {problem}")

    def _step(self, choose: random.Random) -> None:
        """Make one run, or several with the same held adapters, or reload an adapter."""
        inputs = [choose.randrange(INPUTS) for _ in range(choose.randint(1, ROWS))]
        kind = choose.random()
        if kind < 0.15:  # one for all rows
            which = [choose.randrange(len(self.specs))] * len(inputs)
            spec = self.specs[which[0]]
            self._compare(inputs, which, self._run(self.session, inputs, spec))
            return
        which = [choose.randrange(len(self.specs)) for _ in inputs]
        rows = [self.specs[number] for number in which]
        if kind < 0.85:
            self._compare(inputs, which, self._run(self.session, inputs, rows))
        elif kind < 0.95:
            with self.session.hold(rows) as held:
                for _ in range(3):
                    self._compare(inputs, which, self._run(held, inputs, None))
        else:
            name = choose.choice(list(self._adapters))
            self.session.load(name, self._adapters[name], replace=True)
            self.session.pin(name)
            self.session.unpin(name)

    def _run(self, runner: Any, inputs: Sequence[int], adapters: Any) -> NDArray[Any]:
        session = runner if isinstance(runner, ld.AdapterSession) else self.session
        feeds = sample_feeds(session, len(inputs), past=0, new=LENGTH)
        feeds["input_ids"][:] = self._inputs[list(inputs)]
        given = () if adapters is None else (adapters,)
        result: NDArray[Any] = runner.run(["logits"], feeds, *given)[0]
        return result

    def _compare(self, inputs: Sequence[int], which: Sequence[int], result: NDArray[Any]) -> None:
        errors = [
            float(np.abs(row - self.expected[spec][number]).max())
            for row, number, spec in zip(result, inputs, which, strict=True)
        ]
        wrong = [
            f"row {place} of {[self.specs[spec] for spec in which]} is {error:.3g} off"
            for place, error in enumerate(errors)
            if not error <= self.tolerance
        ]
        self._note(rows=len(errors), worst=max(errors), wrong=wrong)

    def _note(
        self, *, rows: int = 0, worst: float = 0.0, wrong: Sequence[str] = (), raised: str = ""
    ) -> None:
        with self._lock:
            self.counts.runs += bool(rows)
            self.counts.rows += rows
            self.counts.worst = max(self.counts.worst, worst)
            self.counts.wrong += wrong[: max(0, 10 - len(self.counts.wrong))]
            if raised:
                self.counts.raised.append(raised)


def memory_over_loads(bundle: Path, adapters: Mapping[str, Path], loads: int) -> dict[int, float]:
    """Return resident memory in MiB by number of loads; each adapter is used and unloaded."""
    import psutil

    process = psutil.Process()
    session = ld.AdapterSession(bundle)
    paths = list(adapters.values())
    seen = {}
    for number in range(loads + 1):
        if number % max(1, loads // 10) == 0:
            seen[number] = round(process.memory_info().rss / 2**20, 1)
            print(f"{number} loads: {seen[number]} MiB", file=sys.stderr, flush=True)
        name = f"n{number}"
        session.load(name, paths[number % len(paths)])
        feeds = sample_feeds(session, 2, past=0, new=LENGTH)
        session.run(["logits"], feeds, [name, None])
        session.unload(name)
    return seen


def tiny_bundles(place: Path) -> dict[str, Path]:
    """Export a random Llama of two layers in every layout."""
    random_llama(place / "model", vocab_size=128)
    for name, options in LAYOUTS.items():
        ld.export(place / "model", place / name, **options)
    return {name: place / name for name in LAYOUTS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="time for all layouts together")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument(
        "--loads", type=int, default=0, help="number of adapter loads, with memory recorded"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        bundles = tiny_bundles(Path(temporary))
        adapters = write_adapters(bundles["slots"], Path(temporary) / "adapters")
        for name, bundle in bundles.items() if given.seconds else ():
            stress = Stress(bundle, adapters, TOLERANCE)
            share = given.seconds / len(bundles)
            counts = stress.run(share, given.threads, given.seed)
            print(f"{name}: {counts.rows} rows", file=sys.stderr, flush=True)
            report[name] = {"apart": round(stress.apart(), 3), **asdict(counts)}
        if given.loads:
            report["memory_mib"] = memory_over_loads(bundles["slots"], adapters, given.loads)
    print(json.dumps(report, indent=2))
    return int(any(value.get("wrong") or value.get("raised") for value in report.values()))


if __name__ == "__main__":
    sys.exit(main())
