"""Training on SmolLM2-135M: PEFT with transformers' Trainer against loradeploy, in one run.

    python -m tools.bench_train [--rounds 9] [--output build/bench]

Both train the same adapter (rank 16, all linear layers, the same first values) on the same batches
of BBC News in the same order, to write a story's headline; a call is one optimizer step. PEFT's
side is what its users write: the Trainer's defaults, a padding collator, the model's own loss.
Writes train.json and train.md. How it is timed is in `tools/timing/alternate.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console

from loradeploy.files import atomic_file, write_json
from tools.inputs.news_tasks import full_stories
from tools.inputs.real_models import bbc_news, smollm2
from tools.timing.alternate import WARM_UP, Side, Worker, alternate, ratio, serve_worker

if TYPE_CHECKING:
    from loradeploy.lora.inject import Injection
    from loradeploy.train.loop.trainer import AdapterTrainer

RANK = 16
LEARNING_RATE = 5e-4
PEFT_PAIR, CONTROL = ("peft", "loradeploy"), ("loradeploy", "loradeploy")
FLOOR_PAIR = ("loradeploy", "floor")
console = Console(stderr=True)


# -- the sides: each is made in a process of its own -------------------------------------------


def peft(width: str, adapter: str, record: str, **given: Any) -> Side:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer

    model = AutoModelForCausalLM.from_pretrained(
        smollm2(), trust_remote_code=False, dtype=_dtype(width)
    )
    trainer = Trainer(
        model=PeftModel.from_pretrained(model, adapter, is_trainable=True),
        args=_arguments(**given),
        train_dataset=_dataset(**given),
        data_collator=DataCollatorForSeq2Seq(_tokenizer(), padding=True),
    )
    return _step_by_step(trainer, Path(record))


def loradeploy(record: str, **given: Any) -> Side:
    trainer, _ = _ours(**given)
    return _step_by_step(trainer, Path(record))


def floor(record: str, **given: Any) -> Side:
    """The frozen model alone: forward, and the gradient of its input; no adapter, no optimizer."""
    import torch

    trainer, injection = _ours(**given)
    injection.remove()
    model = trainer.model
    model.get_input_embeddings().register_forward_hook(lambda *io: io[-1].requires_grad_())
    batches = iter(trainer.get_train_dataloader())

    def call() -> None:
        batch = trainer.batch_loss(model, next(batches))
        torch.autograd.backward(batch.total / batch.items)
        _write_record(Path(record), [])

    return call


SIDES: dict[str, Callable[..., Side]] = {side.__name__: side for side in (peft, loradeploy, floor)}

# Tokens of an example at most, examples of a batch, width of the frozen base, and the pairs that
# are timed against each other: two processes at a time, since PEFT's takes 10 GB.
PLANS: tuple[tuple[int, int, str, tuple[tuple[str, str], ...]], ...] = (
    (512, 8, "fp32", (PEFT_PAIR, CONTROL, FLOOR_PAIR)),
    (1024, 4, "fp32", (PEFT_PAIR, CONTROL, FLOOR_PAIR)),
    (512, 8, "bf16", (PEFT_PAIR, CONTROL)),
)


def _ours(
    width: str, adapter: str, max_length: int, batch: int, steps: int
) -> tuple[AdapterTrainer, Injection]:
    from transformers import AutoModelForCausalLM

    from loradeploy.adapter import load_adapter
    from loradeploy.lora.inject import load
    from loradeploy.train.data.packing import PackingCollator, enable_packing
    from loradeploy.train.loop.trainer import AdapterTrainer
    from loradeploy.train.tasks.losses import causal_lm_loss

    model = AutoModelForCausalLM.from_pretrained(
        smollm2(), trust_remote_code=False, dtype=_dtype(width)
    )
    if not enable_packing(model):
        raise RuntimeError("SmolLM2 is expected to pack")
    injection = load(model, load_adapter(adapter))
    trainer = AdapterTrainer(
        injection=injection,
        loss=causal_lm_loss,
        adapter=injection.adapter,
        checkpoint=lambda step: nullcontext(Path(f"build/bench/trainer/checkpoint-{step}")),
        args=_arguments(max_length=max_length, batch=batch, steps=steps),
        train_dataset=_dataset(max_length=max_length, batch=batch, steps=steps),
        data_collator=PackingCollator(),
    )
    return trainer, injection


def _arguments(*, batch: int, steps: int, **_: Any) -> Any:
    """The Trainer's settings: its own, but for what both sides must agree on."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir="build/bench/trainer",
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=0,
    )


def _dataset(*, max_length: int, batch: int, steps: int, **_: Any) -> list[dict[str, list[int]]]:
    """Stories of as many batches as there are steps, with the loss on the headline."""
    tokenizer = _tokenizer()
    features = []
    for story in full_stories(bbc_news())[: batch * steps]:
        answer = [*tokenizer.encode(f" {story.headline}"), tokenizer.eos_token_id]
        question = tokenizer.encode(f"News story: {story.text}")[: max_length - len(answer) - 8]
        question += tokenizer.encode("\n\nHeadline:")
        features.append({"input_ids": question + answer, "labels": [-100] * len(question) + answer})
    return features


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2(), trust_remote_code=False)


def _dtype(width: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[width]


def _step_by_step(trainer: Any, record: Path) -> Side:
    """A side that lets `trainer`, which runs in a thread of its own, make one step a call."""
    from transformers import PrinterCallback, TrainerCallback

    go, done, losses = threading.Semaphore(0), threading.Semaphore(0), []

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            go.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.release()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            losses.append(logs.get("loss"))
            _write_record(record, losses)

    trainer.remove_callback(PrinterCallback)  # what a side prints is its answer
    trainer.add_callback(Turns())
    threading.Thread(target=trainer.train, daemon=True).start()

    def call() -> None:
        go.release()
        done.acquire()

    return call


def _write_record(file: Path, losses: Sequence[float | None]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    write_json(file, {"losses": losses, "peak_bytes": peak})


# -- the run -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of every side")
    parser.add_argument("--plans", type=int, nargs="*", default=range(len(PLANS)))
    arguments = parser.parse_args()

    with TemporaryDirectory() as place:
        first = _first_adapter(Path(place) / "adapter")
        results = [
            measure(PLANS[number], first, Path(place), arguments.rounds)
            for number in arguments.plans
        ]
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "rank": RANK}
    report = {"machine": machine, "rounds": arguments.rounds, "results": results}
    write_json(arguments.output / "train.json", report)
    with atomic_file(arguments.output / "train.md") as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def _first_adapter(place: Path) -> Path:
    """The values that every side begins with."""
    from transformers import AutoModelForCausalLM

    from loradeploy.adapter import AdapterConfig, save_adapter
    from loradeploy.lora.inject import inject

    config = AdapterConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    injection = inject(
        AutoModelForCausalLM.from_pretrained(smollm2(), trust_remote_code=False), config, seed=0
    )
    save_adapter(injection.adapter(), place)
    return place


def measure(plan: tuple[int, int, str, Any], first: Path, place: Path, rounds: int) -> Any:
    """The ratios of a plan's pairs; tokens a second, peak memory and losses of both trainers."""
    max_length, batch, width, pairs = plan
    steps = WARM_UP + rounds
    given = {"max_length": max_length, "batch": batch, "steps": steps}
    lengths = [len(feature["input_ids"]) for feature in _dataset(**given)]
    report: dict[str, Any] = {**given, "width": width, "tokens_a_step": sum(lengths) / steps}
    for pair in pairs:
        console.print(f"{batch} × {max_length} tokens, {width}: {pair[0]} against {pair[1]}")
        side = {**given, "width": width, "adapter": str(first)}
        records = [place / f"{width}-{max_length}-{name}-{n}.json" for n, name in enumerate(pair)]
        workers = [
            Worker("tools.bench_train", name, {**side, "record": str(record)})
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
                report[name] = {**record, "tokens_a_second": sum(lengths) / steps / median(seconds)}
            losses = zip(*(record["losses"][: steps - 1] for record in seen), strict=True)
            report["largest_loss_difference"] = max(abs(one - other) for one, other in losses)
            report["peak"] = seen[1]["peak_bytes"] / seen[0]["peak_bytes"]
    return report


def markdown(results: Sequence[Any]) -> str:
    """The results as a table."""
    lines = ["| tokens × examples | base | what | median | quartiles |", "|---|---|---|---|---|"]
    for result in results:
        head = f"| {result['max_length']} × {result['batch']} | {result['width']} |"
        for pair in (PEFT_PAIR, CONTROL, FLOOR_PAIR):
            if found := result.get(" / ".join(pair)):
                spread = f"{found['low']:.2f}–{found['high']:.2f}"
                lines.append(
                    f"{head} time, {' / '.join(pair)} | {found['median']:.2f} | {spread} |"
                )
        lines.append(f"{head} peak memory, loradeploy / peft | {result['peak']:.2f} | |")
        difference = result["largest_loss_difference"]
        lines.append(f"{head} largest difference of a step's loss | {difference:.1e} | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__" and not serve_worker(SIDES):
    main()
