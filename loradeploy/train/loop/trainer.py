"""transformers' Trainer for adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler

from loradeploy.adapter import Adapter, load_adapter, save_adapter
from loradeploy.errors import LoraDeployError, TrainingError, UsageError, kind_and_line
from loradeploy.lora.inject import Injection, copy_into
from loradeploy.train.config import TrainConfig
from loradeploy.train.data.features import IGNORED
from loradeploy.train.loop.checkpoints import BEST
from loradeploy.train.loop.processes import process_count
from loradeploy.train.reporting.curve import COLUMNS
from loradeploy.train.tasks.losses import BatchLoss, LossFunction

# A forward pass of fewer tokens takes most of its time to read the weights.
_FEW_TOKENS: Final = 1024
_ADVICE = "lower `learning_rate`, or check the data"


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints are adapters, and whose loss is checked at every step.

    `injection`: the trained adapter in the model; `adapter` returns it as data. `checkpoint`: a
    context manager, used by the main process, that yields the directory for the checkpoint of a
    step, which is complete when the context exits. `evaluation`: the evaluation examples.
    `patience`: the number of evaluations without a lower loss after which training stops; 0: never.
    `keep_best`: keep the adapter with the lowest loss in `best`. `ratio`: B's learning rate divided
    by A's (LoRA+). `regroup`: evaluate short examples in larger batches than those of training; the
    loss of an example must not depend on the others of its batch.
    """

    def __init__(
        self,
        *,
        injection: Injection,
        loss: LossFunction,
        adapter: Callable[[], Adapter],
        checkpoint: Callable[[int], AbstractContextManager[Path]],
        evaluation: Sequence[dict[str, Any]] = (),
        patience: int = 0,
        keep_best: bool = False,
        ratio: float = 1.0,
        regroup: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model=injection.model, eval_dataset=evaluation or None, **options)
        self._injection = injection
        self._loss = loss
        self._adapter = adapter
        self._checkpoint = checkpoint
        self._evaluation = evaluation
        self._patience = patience
        self._keep_best = keep_best
        self._ratio = ratio
        self._regroup = regroup
        self.optimizer: Any
        self.control: Any
        self.state: Any
        self.best: Adapter | None = None
        # Gradients are accumulated over batches: each loss is divided by the labels of all batches.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    def batch_loss(self, model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> BatchLoss:
        """The loss of a batch.

        Raises:
            TrainingError: it is not finite.
        """
        loss = self._loss(model, inputs)
        if not torch.isfinite(loss.total):
            step = self.state.global_step + 1
            raise TrainingError(f"the loss is {loss.total.item()} at step {step}: {_ADVICE}")
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss that Trainer differentiates: a mean over `num_items_in_batch`, or this batch."""
        batch = self.batch_loss(model, inputs)
        items = batch.items if num_items_in_batch is None else num_items_in_batch
        loss = batch.total / torch.as_tensor(items).clamp(min=1)
        # The count is over all processes, whose gradients Trainer averages.
        loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # Trainer does not count labels of -100, which a regression may have as a number.
        counted = [
            {**batch, "labels": torch.zeros_like(labels)}
            if torch.is_floating_point(labels := batch["labels"])
            else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    @torch.no_grad()
    def mean_loss(self, examples: Sequence[dict[str, Any]]) -> tuple[float, float]:
        """The mean loss over all labels of `examples`, and the accuracy.

        Each process takes its share. The random state and the order of training do not change.
        """
        training = self.model.training
        self.model.eval()
        # Sorted by length, for less padding; the order does not affect the mean.
        ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = self.args.per_device_eval_batch_size
        sums = torch.zeros(3, dtype=torch.float64)
        tokens = max(_FEW_TOKENS, size * len(ordered[-1]["input_ids"])) if self._regroup else 0
        for batch_of_all in evaluation_batches(ordered, size * count, tokens * count):
            share = batch_of_all[rank::count]
            # Sharded models need every process in every batch: one without a share repeats an
            # example.
            batch = self._prepare_inputs(self.data_collator(share or ordered[:1]))
            loss = self.batch_loss(self.model, batch)
            if share:
                sums += torch.stack([loss.total.cpu(), loss.items.cpu(), loss.right.cpu()])
        total, items, right = self.accelerator.reduce(sums.to(self.args.device)).tolist()
        self.model.train(training)
        return total / max(items, 1), right / max(items, 1)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Evaluate every eval_steps (called by Trainer); keeps the best adapter, and may stop."""
        loss, right = self.mean_loss(self._evaluation)
        metrics = {"eval_loss": loss, "eval_accuracy": right}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self.state.best_metric is None or loss < self.state.best_metric:
            self.state.best_metric, self.state.best_global_step = loss, self.state.global_step
            self.best = self._adapter() if self._keep_best else None
        elif self._is_out_of_patience():
            self.control.should_training_stop = True
        return metrics

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Any:
        """AdamW over the parameters of the adapter."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = parameter_groups(
                self._injection,
                self.args.learning_rate,
                self._ratio,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength(self.train_dataset, size * process_count(), self.args.data_seed)

    def curve(self) -> list[dict[str, float]]:
        """The figures of each step and its evaluation, including steps before a resume."""
        rows: dict[int, dict[str, float]] = {}
        for entry in self.state.log_history:
            row = rows.setdefault(entry["step"], {})
            row.update({name: entry[name] for name in COLUMNS if name in entry})
        return [row for row in rows.values() if len(row) > 1]

    def _is_out_of_patience(self) -> bool:
        if not self._patience or self.state.best_global_step is None:
            return False
        steps = [entry["step"] for entry in self.state.log_history if "eval_loss" in entry]
        best = self.state.best_global_step
        return sum(bool(step > best) for step in steps) >= self._patience

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        # With fp16 occasional overflows are expected: the step is skipped and the scale lowered.
        if not math.isfinite(norm) and not self.args.fp16:
            step = self.state.global_step + 1
            raise TrainingError(f"the gradients' norm is {norm} at step {step}: {_ADVICE}")
        return norm

    def _track_num_input_tokens(self, inputs: Mapping[str, Tensor]) -> None:
        # Trainer's method warns for every packed batch, which has no padding and no mask (5.23).
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if ids is None:  # the source is audio
            tokens = (inputs["labels"] != IGNORED).sum()
        else:
            tokens = torch.tensor(ids.numel()) if mask is None else mask.sum()
        counted = self.accelerator.reduce(tokens.to(self.args.device))
        self.state.num_input_tokens_seen += int(counted)

    # Trainer calls these to write and read checkpoints: of the adapter only, without the base.

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        main = self.args.should_save
        with self._checkpoint(self.state.global_step) if main else nullcontext() as path:
            directory = self.broadcast_path(path) or ""
            self.save_model(directory)
            self._save_optimizer_and_scheduler(directory)
            self._save_scaler(directory)
            self._save_rng_state(directory)
            if main:
                self.state.save_to_json(str(Path(directory, TRAINER_STATE_NAME)))
            self.accelerator.wait_for_everyone()

    def broadcast_path(self, path: Path | None) -> str | None:
        """`path` of the main process, broadcast to every process."""
        box = [None if path is None else str(path)]
        if process_count() > 1:
            broadcast_object_list(box)
        return box[0]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, and the best one if any, in the main process."""
        directory = Path(output_dir or self.args.output_dir)
        adapter = self._adapter()  # every process contributes if the model is sharded
        if self.args.should_save:
            save_adapter(adapter, directory)
            if self.best is not None:
                save_adapter(self.best, directory / BEST)

    def restore_finished(self, checkpoint: str) -> bool:
        """Restore `checkpoint` and return True if its run has no step left.

        Trainer would run one more step (5.23).
        """
        with _readable(checkpoint):
            state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
            fresh, self.state = self.state, state
            ended = bool(state.global_step >= state.max_steps) or self._is_out_of_patience()
        if not ended:
            self.state = fresh
            return False
        self._load_from_checkpoint(checkpoint)
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        directory = Path(resume_from_checkpoint)
        with _readable(directory):
            copy_into(self._injection, load_adapter(directory))
            if (directory / BEST).is_dir():
                self.best = load_adapter(directory / BEST)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)


@contextmanager
def _readable(checkpoint: str | Path | None) -> Iterator[None]:
    """Convert read errors of a checkpoint to UsageError; torch loads only data (weights_only)."""
    advice = "remove it, and resume from the one before it"
    try:
        yield
    except LoraDeployError:
        raise
    except UnpicklingError:  # its text advises to load it anyway
        raise UsageError(
            f"{checkpoint} is broken, or contains code, which is not loaded: {advice}"
        ) from None
    except Exception as problem:  # torch and json raise various errors
        raise UsageError(
            f"{checkpoint} cannot be read ({kind_and_line(problem)}): {advice}"
        ) from None


def arguments(config: TrainConfig, checkpoints: Path, *, examples: int) -> TrainingArguments:
    """The Trainer's settings for `config` and a number of training examples.

    Raises:
        UsageError: this machine does not support the autocast precision.
    """
    if config.autocast == "fp16" and not torch.cuda.is_available():
        raise UsageError("`autocast` fp16 needs a GPU: use bf16, which CPUs support too")
    steps = steps_of(config, examples)
    schedules = {"constant": "constant_with_warmup"}
    settings = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=config.autocast == "bf16",
        fp16=config.autocast == "fp16",
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedules.get(config.schedule, config.schedule),
        # The rate of the first step of a warm-up is 0: one step alone would train nothing.
        warmup_steps=min(config.warmup_steps, steps - 1),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        max_steps=steps,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        # The loss is computed inside the model; DDP would not find it from the outputs.
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # One device per process: Trainer would split each batch over all with DataParallel.
    if settings.n_gpu > 1:
        settings._n_gpu = 1
    return settings


def steps_of(config: TrainConfig, examples: int) -> int:
    """The number of optimizer steps of the run; a step has a batch of every process."""
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(examples / (config.batch_size * process_count()))
    return max(1, math.ceil(math.ceil(batches / config.gradient_accumulation) * config.epochs))


def evaluation_batches(
    ordered: Sequence[dict[str, Any]], size: int, tokens: int
) -> Iterator[Sequence[dict[str, Any]]]:
    """Batches of `size` examples, and of more as long as they have at most `tokens` when padded.

    `ordered`: sorted by length.
    """
    begin = 0
    while begin < len(ordered):
        end = begin + size
        while end < len(ordered) and (end + 1 - begin) * len(ordered[end]["input_ids"]) <= tokens:
            end += 1
        yield ordered[begin:end]
        begin = end


class ByLength(LengthGroupedSampler):  # type: ignore[misc]
    """Batches of examples of similar length, in an order determined by `seed` and the epoch.

    The sampler of transformers uses the global random state: a run resumed in the middle of an
    epoch would continue in another order (5.23).
    """

    def __init__(self, examples: Sequence[dict[str, Any]], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, lengths=[len(example["input_ids"]) for example in examples])
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Start the order of `epoch`; called by accelerate."""
        self.generator = torch.Generator().manual_seed((self._seed << 20) + epoch)


def parameter_groups(
    injection: Injection, learning_rate: float, ratio: float, *, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of the optimizer: B with `ratio` × `learning_rate`, others without `ratio`.

    As in the authors' code of LoRA+, the ratio applies to B of linear layers and convolutions and
    to all vectors (biases, DoRA's magnitudes), but not to the factors of embeddings and to the
    other parameters of modules_to_save. Biases are not decayed. Empty groups are omitted.
    """
    fast = {id(layer.lora_B) for layer in injection.layers.values() if layer.kind != "embedding"}
    biases = {id(p) for name, p in injection.saved.items() if name.endswith("bias")}
    biases |= {id(b) for layer in injection.layers.values() if (b := layer.lora_bias) is not None}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in injection.parameters():
        quick = id(parameter) in fast or parameter.ndim == 1
        groups.setdefault((quick, id(parameter) not in biases), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (ratio if quick else 1.0),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (quick, decayed), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]
