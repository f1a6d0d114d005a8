"""Benchmark training with other trainers against loradeploy.

    python -m tools.bench_train [--rounds 9] [--plans 0 3] [--output build/bench]
        [--peers peft unsloth torchtune] [--torchtune VENV/bin/python]

The others are PEFT with transformers' Trainer, techniques of Unsloth on top of both (`unsloth.py`),
and torchtune, in an environment of its own (`torchtune.py`), if `--torchtune` is given. All train
the same adapter (rank 16, all linear layers, the same initial values) on the same batches of BBC
News in the same order: a decoder writes a story's headline, an encoder predicts its topic. A call
is one optimizer step. If the losses of a step differ by more than rounding, the benchmark ends
without a figure. Writes train.json and train.md. The timing method is described in
`tools/timing/alternate.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

from rich.console import Console

from loradeploy.files import atomic_file, write_json
from tools.bench_train.models import MODELS
from tools.bench_train.sides import LEARNING_RATE
from tools.timing.alternate import WARM_UP, Worker, alternate, ratio

RANK: Final = 16
OURS: Final = "loradeploy"
PEFT, UNSLOTH, TORCHTUNE = PEERS = ("peft", "unsloth", "torchtune")
CONTROL, FLOOR_PAIR = (OURS, OURS), (OURS, "floor")
# The largest allowed difference of a step's loss: rounding in float32, and in bfloat16.
SAME: Final = {"float32": 1e-4, "bfloat16": 5e-2}
console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """A batch size, and the sides to time.

    `max_length`: tokens of an example at most. `batch`: examples. `dtype`: of the frozen base.
    `peers`: the trainers to compare with. `floor`: whether to time the frozen model alone, too.
    Two processes run at a time, because PEFT's takes 10 GB with SmolLM2.
    """

    model: str
    max_length: int
    batch: int
    dtype: str = "float32"
    peers: tuple[str, ...] = PEERS
    floor: bool = True


PLANS: Final = (
    Plan("SmolLM2-135M", 512, 8),
    Plan("SmolLM2-135M", 1024, 4),
    Plan("SmolLM2-135M", 512, 8, "bfloat16", (PEFT,), floor=False),
    Plan("MiniLM-L6", 128, 16, peers=(PEFT,)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each side")
    parser.add_argument(
        "--plans", type=int, nargs="*", default=range(len(PLANS)), help="indices of PLANS to run"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--torchtune", type=Path, help="the Python that has torchtune")
    arguments = parser.parse_args()

    results = []
    for number in arguments.plans:
        with TemporaryDirectory() as place:
            plan = PLANS[number]
            names = [name for name in plan.peers if name in arguments.peers]
            if arguments.torchtune is None and TORCHTUNE in names:
                names.remove(TORCHTUNE)
            results.append(measure(plan, Path(place), arguments.rounds, names, arguments.torchtune))
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "rank": RANK}
    report = {"machine": machine, "rounds": arguments.rounds, "results": results}
    write_json(arguments.output / "train.json", report)
    with atomic_file(arguments.output / "train.md") as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def _first_adapter(model: str, place: Path) -> Path:
    """Write the adapter with the initial values of all sides."""
    from loradeploy.adapter import AdapterConfig, save_adapter
    from loradeploy.lora.inject import inject

    benchmarked = MODELS[model]
    config = AdapterConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules="all-linear",
        task_type=benchmarked.task_type,
        modules_to_save=benchmarked.heads,
    )
    save_adapter(inject(benchmarked.model("float32"), config, seed=0).adapter(), place)
    return place


def measure(
    plan: Plan, place: Path, rounds: int, peers: Sequence[str], torchtune: Path | None
) -> dict[str, Any]:
    """Measure ratios of a plan's pairs, and tokens/s, peak memory and losses of each trainer.

    Raises:
        RuntimeError: a peer's losses are not loradeploy's, so that it does other work.
    """
    steps = WARM_UP + rounds
    sizes = {"max_length": plan.max_length, "batch": plan.batch, "steps": steps}
    benchmarked = MODELS[plan.model]
    features = benchmarked.features(benchmarked.tokenizer(), plan.batch * steps, plan.max_length)
    write_json(place / "examples.json", features)
    tokens = sum(len(feature["input_ids"]) for feature in features) / steps
    adapter = _first_adapter(plan.model, place / "adapter")
    given = {**sizes, "model": plan.model, "dtype": plan.dtype, "adapter": str(adapter)}
    files = {"base": str(benchmarked.directory()), "examples": str(place / "examples.json")}

    def worker(name: str, record: Path) -> Worker:
        arguments = {**given, "record": str(record)}
        if name != TORCHTUNE:
            return Worker("tools.bench_train.sides", name, arguments)
        arguments |= {**files, "learning_rate": LEARNING_RATE}
        return Worker("tools.bench_train.torchtune", name, arguments, python=str(torchtune))

    report: dict[str, Any] = {
        **sizes,
        "model": plan.model,
        "dtype": plan.dtype,
        "tokens_a_step": tokens,
        "peers": {},
    }
    for pair in (*((peer, OURS) for peer in peers), CONTROL, *((FLOOR_PAIR,) * plan.floor)):
        console.print(
            f"{plan.model}, {plan.batch} × {plan.max_length} tokens, {plan.dtype}:"
            f" {pair[0]} compared with {pair[1]}"
        )
        records = [place / f"{name}-{number}.json" for number, name in enumerate(pair)]
        workers: list[Worker] = []
        try:
            workers += [worker(*part) for part in zip(pair, records, strict=True)]
            taken = alternate(workers, rounds=rounds, calls=1)
        finally:
            for started in workers:
                started.close()
        report[" / ".join(pair)] = vars(ratio(*taken))
        if pair[0] in PEERS:
            seen = [json.loads(record.read_text()) for record in records]
            for name, record, seconds in zip(pair, seen, taken, strict=True):
                report[name] = {**record, "tokens_a_second": tokens / median(seconds)}
            report["peers"][pair[0]] = _compared(plan, pair[0], *seen)
    return report


def _compared(plan: Plan, name: str, peer: Any, ours: Any) -> dict[str, float]:
    """Compare the losses, the memory and the start of a peer with those of loradeploy."""
    count = min(len(peer["losses"]), len(ours["losses"])) - 1  # the last one may not be logged
    losses = zip(peer["losses"][:count], ours["losses"][:count], strict=True)
    difference = max(abs(one - other) for one, other in losses)
    if difference > SAME[plan.dtype]:
        raise RuntimeError(f"a step's loss with {name} differs by {difference:.1e}: other work")
    return {
        "largest_loss_difference": difference,
        "peak": ours["peak_bytes"] / peer["peak_bytes"],
        "start": ours["start_seconds"] / peer["start_seconds"],
    }


def markdown(results: Sequence[Any]) -> str:
    """Return the results as a table."""
    lines = [
        "| model | tokens × examples | base | what | median | quartiles |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        size = f"{result['max_length']} × {result['batch']}"
        head = f"| {result['model']} | {size} | {result['dtype']} |"
        for name in (
            *(f"{peer} / {OURS}" for peer in PEERS),
            *map(" / ".join, (CONTROL, FLOOR_PAIR)),
        ):
            if found := result.get(name):
                spread = f"{found['low']:.2f}–{found['high']:.2f}"
                lines.append(f"{head} time, {name} | {found['median']:.2f} | {spread} |")
        for peer, found in result["peers"].items():
            difference = found["largest_loss_difference"]
            start = f"processor time before the first step, {OURS} / {peer}"
            lines += [
                f"{head} peak memory, {OURS} / {peer} | {found['peak']:.2f} | |",
                f"{head} {start} | {found['start']:.2f} | |",
                f"{head} largest difference of a step's loss to {peer}'s | {difference:.1e} | |",
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
