"""transformers' Trainer, told about adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from loradeploy.adapter import Adapter, load_adapter, save_adapter
from loradeploy.errors import TrainingError
from loradeploy.lora.inject import Injection, copy_into
from loradeploy.train.config import TrainConfig
from loradeploy.train.losses import BatchLoss, LossFunction


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints are adapters, and whose loss is checked at every step.

    `injection` is what it trains, `adapter` gives that as data.
    """

    def __init__(
        self,
        *,
        injection: Injection,
        loss: LossFunction,
        adapter: Callable[[], Adapter],
        **options: Any,
    ) -> None:
        super().__init__(model=injection.model, **options)
        self._injection = injection
        self._loss = loss
        self._adapter = adapter
        # Gradients of several batches are summed: each loss is divided by the labels of all.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    def batch_loss(self, model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
        """The loss of a batch.

        Raises:
            TrainingError: it is not finite.
        """
        loss = self._loss(model, inputs)
        if not torch.isfinite(loss.total):
            raise TrainingError(
                f"the loss is {loss.total.item()} at step {self.state.global_step + 1}:"
                " lower learning_rate, or look at the data"
            )
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """What Trainer differentiates: a mean over `num_items_in_batch`, or this batch's labels."""
        batch = self.batch_loss(model, inputs)
        loss = batch.total / (batch.items if num_items_in_batch is None else num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    @torch.no_grad()
    def mean_loss(self, examples: Sequence[dict[str, Any]]) -> tuple[float, float]:
        """The mean loss over all labels of `examples`, and the share that came out on top."""
        training = self.model.training
        self.model.eval()
        total, items, right = 0.0, 0, 0
        # By length, so that little is padding: the mean does not know the order.
        ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
        for inputs in self.get_eval_dataloader(ordered):
            batch = self.batch_loss(self.model, self._prepare_inputs(inputs))
            total += float(batch.total)
            items += int(batch.items)
            right += int(batch.right)
        self.model.train(training)
        return total / items, right / items

    def curve(self) -> list[dict[str, float]]:
        """Step, loss, learning rate and gradient norm of each step, earlier sessions' included."""
        names = ("step", "loss", "learning_rate", "grad_norm")
        return [
            {name: entry[name] for name in names if name in entry}
            for entry in self.state.log_history
            if "loss" in entry
        ]

    # What Trainer calls to write a checkpoint and to read it: the adapter alone, not the base.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        save_adapter(self._adapter(), output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        copy_into(self._injection, load_adapter(resume_from_checkpoint))


def arguments(config: TrainConfig, checkpoints: Path, *, examples: int) -> TrainingArguments:
    """The Trainer's settings for `config` and a number of training examples."""
    steps = steps_of(config, examples)
    schedules = {"constant": "constant_with_warmup"}
    settings = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedules.get(config.schedule, config.schedule),
        warmup_steps=min(config.warmup_steps, steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        max_steps=steps,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 1,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=config.seed,
        data_seed=config.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # One device a process: Trainer would spread each batch over all with DataParallel.
    if settings.n_gpu > 1:
        settings._n_gpu = 1
    return settings


def steps_of(config: TrainConfig, examples: int) -> int:
    """How many optimiser steps the run has."""
    if config.max_steps:
        return config.max_steps
    batches = math.ceil(examples / config.batch_size)
    return max(1, math.ceil(math.ceil(batches / config.gradient_accumulation) * config.epochs))
