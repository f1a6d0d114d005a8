"""transformers' Trainer, told about adapters."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loradeploy.errors import TrainingError
from loradeploy.lora.inject import Injection
from loradeploy.train.config import CAUSAL_LM, TrainConfig
from loradeploy.train.features import IGNORED

_WEIGHTS: Final = "adapter.safetensors"
_SETTINGS: Final = "config.json"


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that saves the adapter alone, and computes logits only where there are labels.

    The loss is exactly the model's own, for a causal language model the mean over the labelled
    tokens; it is checked to be finite at every step. `tokens` counts what was trained on.
    """

    def __init__(self, *, injection: Injection, config: TrainConfig, **options: Any) -> None:
        super().__init__(model=injection.model, **options)
        self.tokens = 0
        self._injection = injection
        self._config = config
        forward = inspect.signature(type(injection.model).forward).parameters
        self._keeps_logits = config.task == CAUSAL_LM and "logits_to_keep" in forward

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *rest: Any
    ) -> torch.Tensor:
        """A forward and a backward pass."""
        self.tokens += int(inputs["attention_mask"].sum())
        loss: torch.Tensor = super().training_step(model, inputs, *rest)
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; summed over tokens and divided by `num_items_in_batch` if given."""
        if self._config.task == CAUSAL_LM:
            loss, outputs = self._causal_loss(model, inputs, num_items_in_batch)
        else:
            outputs = model(**inputs)
            loss = outputs.loss
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}:"
                " lower the learning rate, or look at the data"
            )
        return (loss, outputs) if return_outputs else loss

    def _causal_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, Any]:
        labels = inputs["labels"][:, 1:]  # [batch, sequence - 1]
        feeds = {name: value for name, value in inputs.items() if name != "labels"}
        if self._keeps_logits:
            # Position t predicts token t + 1: only columns that predict a label need logits.
            columns = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
            labels = labels[:, columns]
            outputs = model(**feeds, logits_to_keep=columns, use_cache=False)
            logits = outputs.logits
        else:
            outputs = model(**feeds)
            logits = outputs.logits[:, :-1]
        total = cross_entropy(
            logits.flatten(0, 1).float(),
            labels.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        return total / (num_items if num_items is not None else (labels != IGNORED).sum()), outputs

    # The two hooks below keep checkpoints as small as the adapter.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        place = Path(output_dir or self.args.output_dir or ".")
        place.mkdir(parents=True, exist_ok=True)
        save_file(_trained(self._injection), place / _WEIGHTS)
        (place / _SETTINGS).write_text(json.dumps(vars(self._config)), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        place = Path(resume_from_checkpoint)
        saved = load_file(place / _WEIGHTS)
        with torch.no_grad():
            for name, parameter in _trained(self._injection).items():
                parameter.copy_(saved[name])


def _trained(injection: Injection) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for module, layer in injection.layers.items():
        tensors[f"{module}.lora_A"] = layer.lora_A.data
        tensors[f"{module}.lora_B"] = layer.lora_B.data
    return {**tensors, **{name: parameter.data for name, parameter in injection.saved.items()}}


class Progress(TrainerCallback):  # type: ignore[misc]
    """Shows steps and loss on stderr where that is a terminal, and keeps every step's figures."""

    def __init__(self) -> None:
        self.curve: list[dict[str, float]] = []
        self._bar: Any = None
        self._task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "", total=state.max_steps, completed=state.global_step, loss=""
        )
        self._bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Keep a step's figures and move the bar."""
        if not logs or "loss" not in logs:
            return
        names = ("loss", "learning_rate", "grad_norm")
        figures = {name: float(logs[name]) for name in names if name in logs}
        self.curve.append({"step": state.global_step, **figures})
        self._bar.update(
            self._task, completed=state.global_step, loss=f"loss {figures['loss']:.3f}"
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar, where it is open."""
        if self._bar is not None:
            self._bar.stop()


def arguments(config: TrainConfig, checkpoints: Path, *, steps: int) -> TrainingArguments:
    """The Trainer's settings for `config`."""
    return TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule
        if config.schedule != "constant"
        else "constant_with_warmup",
        warmup_steps=min(config.warmup_steps, steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        max_steps=steps,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 1,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=config.seed,
        data_seed=config.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def steps_of(config: TrainConfig, examples: int) -> int:
    """How many optimiser steps the run has."""
    if config.max_steps:
        return config.max_steps
    batches = math.ceil(examples / config.batch_size)
    return max(1, math.ceil(math.ceil(batches / config.gradient_accumulation) * config.epochs))
