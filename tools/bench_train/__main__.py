"""Benchmark training with PEFT and transformers' Trainer against loradeploy.

    python -m tools.bench_train [--rounds 9] [--plans 0 3] [--output build/bench]

Both train the same adapter (rank 16, all linear layers, the same initial values) on the same
batches of BBC News in the same order: a decoder writes a story's headline, an encoder predicts its
topic. A call is one optimizer step. Writes train.json and train.md. The timing method is described
in `tools/timing/alternate.py`.
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
from tools.timing.alternate import WARM_UP, Worker, alternate, ratio

RANK: Final = 16
PEFT_PAIR, CONTROL = ("peft", "loradeploy"), ("loradeploy", "loradeploy")
FLOOR_PAIR = ("loradeploy", "floor")
console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """A batch size, and the pairs of sides to time.

    `max_length`: tokens of an example at most. `batch`: examples. `dtype`: of the frozen base.
    Two processes run at a time, because PEFT's takes 10 GB with SmolLM2.
    """

    model: str
    max_length: int
    batch: int
    dtype: str = "float32"
    pairs: tuple[tuple[str, str], ...] = (PEFT_PAIR, CONTROL, FLOOR_PAIR)


PLANS: Final = (
    Plan("SmolLM2-135M", 512, 8),
    Plan("SmolLM2-135M", 1024, 4),
    Plan("SmolLM2-135M", 512, 8, "bfloat16", (PEFT_PAIR, CONTROL)),
    Plan("MiniLM-L6", 128, 16),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each side")
    parser.add_argument(
        "--plans", type=int, nargs="*", default=range(len(PLANS)), help="indices of PLANS to run"
    )
    arguments = parser.parse_args()

    results = []
    for number in arguments.plans:
        with TemporaryDirectory() as place:
            results.append(measure(PLANS[number], Path(place), arguments.rounds))
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "rank": RANK}
    report = {"machine": machine, "rounds": arguments.rounds, "results": results}
    write_json(arguments.output / "train.json", report)
    with atomic_file(arguments.output / "train.md") as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def _first_adapter(model: str, place: Path) -> Path:
    """Write the adapter with the initial values of both sides."""
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


def measure(plan: Plan, place: Path, rounds: int) -> dict[str, Any]:
    """Measure ratios of a plan's pairs, and tokens/s, peak memory and losses of both trainers."""
    steps = WARM_UP + rounds
    sizes = {"max_length": plan.max_length, "batch": plan.batch, "steps": steps}
    benchmarked = MODELS[plan.model]
    features = benchmarked.features(benchmarked.tokenizer(), plan.batch * steps, plan.max_length)
    tokens = sum(len(feature["input_ids"]) for feature in features) / steps
    adapter = _first_adapter(plan.model, place / "adapter")
    given = {**sizes, "model": plan.model, "dtype": plan.dtype, "adapter": str(adapter)}
    report: dict[str, Any] = {
        **sizes,
        "model": plan.model,
        "dtype": plan.dtype,
        "tokens_a_step": tokens,
    }
    for pair in plan.pairs:
        console.print(
            f"{plan.model}, {plan.batch} × {plan.max_length} tokens, {plan.dtype}:"
            f" {pair[0]} compared with {pair[1]}"
        )
        records = [place / f"{name}-{number}.json" for number, name in enumerate(pair)]
        workers = [
            Worker("tools.bench_train.sides", name, {**given, "record": str(record)})
            for name, record in zip(pair, records, strict=True)
        ]
        try:
            taken = alternate(workers, rounds=rounds, calls=1)
        finally:
            for worker in workers:
                worker.close()
        report[" / ".join(pair)] = vars(ratio(*taken))
        if pair == PEFT_PAIR:
            seen = [json.loads(record.read_text()) for record in records]
            for name, record, seconds in zip(pair, seen, taken, strict=True):
                report[name] = {**record, "tokens_a_second": tokens / median(seconds)}
            losses = zip(*(record["losses"][: steps - 1] for record in seen), strict=True)
            report["largest_loss_difference"] = max(abs(one - other) for one, other in losses)
            report["peak"] = seen[1]["peak_bytes"] / seen[0]["peak_bytes"]
            report["start"] = seen[1]["start_seconds"] / seen[0]["start_seconds"]
    return report


def markdown(results: Sequence[Any]) -> str:
    """Return the results as a table."""
    lines = [
        "| model | tokens × examples | base | what | median | quartiles |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        size = f"{result['max_length']} × {result['batch']}"
        head = f"| {result['model']} | {size} | {result['dtype']} |"
        for pair in (PEFT_PAIR, CONTROL, FLOOR_PAIR):
            if found := result.get(" / ".join(pair)):
                spread = f"{found['low']:.2f}–{found['high']:.2f}"
                lines.append(
                    f"{head} time, {' / '.join(pair)} | {found['median']:.2f} | {spread} |"
                )
        lines.append(f"{head} peak memory, loradeploy / peft | {result['peak']:.2f} | |")
        lines.append(
            f"{head} processor time before the first step, loradeploy / peft"
            f" | {result['start']:.2f} | |"
        )
        difference = result["largest_loss_difference"]
        lines.append(f"{head} largest difference of a step's loss | {difference:.1e} | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
