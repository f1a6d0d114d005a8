"""The sides of the training benchmark, each in a separate process; a call is an optimizer step."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.files import write_json
from tools.bench_train.models import MODELS
from tools.timing.alternate import Side, serve_worker

if TYPE_CHECKING:
    from loradeploy.lora.inject import Injection
    from loradeploy.train.loop.trainer import AdapterTrainer

LEARNING_RATE: Final = 5e-4


def peft(model: str, dtype: str, adapter: str, record: str, **given: Any) -> Side:
    """Typical code of PEFT users: the Trainer's defaults, a padding collator, the model's loss."""
    from transformers import Trainer

    return _step_by_step(_on_peft(Trainer, model, dtype, adapter, **given), Path(record))


def unsloth(model: str, dtype: str, adapter: str, record: str, **given: Any) -> Side:
    """The same with techniques of Unsloth."""
    from tools.bench_train.unsloth import UnslothTrainer, patch

    trainer = _on_peft(UnslothTrainer, model, dtype, adapter, **given)
    patch(trainer.model)
    return _step_by_step(trainer, Path(record))


def loradeploy(record: str, **given: Any) -> Side:
    """The trainer of `loradeploy train`, with the same adapter and batches."""
    trainer, _ = _ours(**given)
    return _step_by_step(trainer, Path(record))


def floor(record: str, **given: Any) -> Side:
    """Only the frozen model: forward, and the gradient of its input; no adapter, no optimizer."""
    import torch

    trainer, injection = _ours(**given)
    injection.remove()
    model = trainer.model.train()  # with the base's own dropout, as in training
    model.get_input_embeddings().register_forward_hook(lambda *io: io[-1].requires_grad_())
    batches = iter(trainer.get_train_dataloader())

    def call() -> None:
        batch = trainer.batch_loss(model, next(batches))
        torch.autograd.backward(batch.total / batch.items)
        write_json(Path(record), {})

    return call


SIDES: Final[dict[str, Callable[..., Side]]] = {
    side.__name__: side for side in (peft, loradeploy, floor, unsloth)
}


def _on_peft(trainer: Any, model: str, dtype: str, adapter: str, **given: Any) -> Any:
    from peft import PeftModel

    benchmarked = MODELS[model]
    return trainer(
        model=PeftModel.from_pretrained(benchmarked.model(dtype), adapter, is_trainable=True),
        args=_arguments(**given),
        train_dataset=_features(model, **given),
        data_collator=benchmarked.peft_collator(benchmarked.tokenizer()),
    )


def _ours(
    model: str, dtype: str, adapter: str, max_length: int, batch: int, steps: int
) -> tuple[AdapterTrainer, Injection]:
    from loradeploy.adapter import load_adapter
    from loradeploy.lora.inject import load
    from loradeploy.train.loop.trainer import AdapterTrainer

    benchmarked = MODELS[model]
    base = benchmarked.model(dtype)
    collator, loss = benchmarked.ours(base, benchmarked.tokenizer())
    injection = load(base, load_adapter(adapter))
    trainer = AdapterTrainer(
        injection=injection,
        loss=loss,
        adapter=injection.adapter,
        checkpoint=lambda step: nullcontext(Path(f"build/bench/trainer/checkpoint-{step}")),
        args=_arguments(batch=batch, steps=steps),
        train_dataset=_features(model, max_length=max_length, batch=batch, steps=steps),
        data_collator=collator,
    )
    return trainer, injection


def _features(model: str, *, max_length: int, batch: int, steps: int) -> list[dict[str, Any]]:
    """Return the examples for all batches of the run."""
    benchmarked = MODELS[model]
    return benchmarked.features(benchmarked.tokenizer(), batch * steps, max_length)


def _arguments(*, batch: int, steps: int, **_: Any) -> Any:
    """Return the Trainer's default settings, except those that must be equal on both sides."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir="build/bench/trainer",
        per_device_train_batch_size=batch,
        max_steps=steps,
        train_sampling_strategy="sequential",  # the order for which torchtune's side has no sampler
        learning_rate=LEARNING_RATE,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=0,
    )


def _step_by_step(trainer: Any, record: Path) -> Side:
    """Return a side that runs `trainer` in a thread, one step per call.

    `record` gets the losses, the peak memory in bytes, and the processor time in seconds that the
    process took before its first step.
    """
    from transformers import PrinterCallback, TrainerCallback

    go, done = threading.Semaphore(0), threading.Semaphore(0)
    losses: list[float | None] = []
    starts: list[float] = []

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            starts.append(time.process_time())
            go.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.release()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            losses.append(logs.get("loss"))
            _write_record(record, losses, starts[0])

    trainer.remove_callback(PrinterCallback)  # the worker's output is its answer
    trainer.add_callback(Turns())
    threading.Thread(target=trainer.train, daemon=True).start()

    def call() -> None:
        go.release()
        done.acquire()

    return call


def _write_record(file: Path, losses: Sequence[float | None], start_seconds: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    write_json(file, {"losses": losses, "peak_bytes": peak, "start_seconds": start_seconds})


if __name__ == "__main__":
    serve_worker(SIDES)
